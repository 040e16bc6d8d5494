"""Whole training steps as CUDA graphs, one for each block size: a replay is one launch. Not yet run on a GPU.

A graph holds `engine.step.train_step`: both passes, optimizer and averages. Graphs save about a thousand launches a
step, so they pay where the GPU waits for the host: small models and small batches. They cost memory. Gradients stay
between steps, and backward adds to their zeros (16 bytes a parameter more to read and write in fp32, by count). Each
graph keeps its outputs. All graphs share the rest, which warm-up steps cannot use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from cjepa_fast.engine.optim import AdamW, fuses
from cjepa_fast.engine.step import Parts, StepOutput
from cjepa_fast.errors import UserError
from cjepa_fast.masks import Masks

WARM_UPS = 2  # steps of a shape before its capture: compiling, tuning and lasting memory cannot be captured
MOST = 32  # graphs: each keeps its outputs' memory, above all the predictions

log = logging.getLogger(__name__)


class Step(Protocol):
    """`train_step` without its first arguments."""

    def __call__(self, images: Tensor, parts: Parts, momentum: float, *, graphed: bool = False) -> StepOutput: ...


def require(kernels: str, device: torch.device) -> None:
    """Raise UserError unless steps can be captured on `device` with these `kernels`; ask before a run."""
    if device.type != "cuda":
        raise UserError(f"runtime.cuda_graph: on needs a GPU, the run is on {device}; use off")
    if not fuses(kernels, device):
        raise UserError("runtime.cuda_graph: on needs the optimizer's Triton kernel, which cannot run; use off")


class Recorder:
    """CUDA's part: the side stream of warm-ups and captures, and the pool of memory that all graphs share.

    A replay may overwrite the results of other graphs of the pool. Lasting tensors (state, gradients, inputs) must be
    allocated outside of captures.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], StepOutput]) -> StepOutput:
        """Run `step` on the stream of its later capture."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = step()
        current.wait_stream(self._stream)
        return out

    def capture(self, step: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        """Record `step` without running it; return its replay, which rewrites the same results."""
        graph = torch.cuda.CUDAGraph()
        # The default mode would fail on CUDA calls of the decoding threads.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> StepOutput:
            graph.replay()
            return out

        return replay


class _Shape:
    """The static masks, warm-up count and graph of one shape of inputs."""

    def __init__(self, masks: Masks | None) -> None:
        empty = (None if mask is None else torch.empty_like(mask) for mask in masks or ())
        self.masks = Masks(*empty) if masks is not None else None  # pyright: ignore[reportArgumentType]
        self.warm_ups = 0
        self.replay: Callable[[], StepOutput] | None = None


class GraphedStep:
    """`train_step` of one process and one micro-batch, replayed where its inputs' shapes are known.

    The first `WARM_UPS` steps of a shape run uncaptured and count like others. Then the shape is captured, which waits
    for the GPU once, and every further step is a replay. Beyond `MOST` shapes steps run uncaptured. Steps with and
    without unions of targets differ in shape.

    The next call overwrites the results, whatever its shape: copy or sum up lasting values.
    """

    def __init__(self, step: Step, optimizer: AdamW, recorder: Recorder) -> None:
        self._step, self._optimizer, self._recorder = step, optimizer, recorder
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._images: Tensor | None = None
        self._full = False

    def __call__(self, images: Tensor, parts: Parts, momentum: float) -> StepOutput:
        (mask,) = parts
        key = tuple(None if tensor is None else tensor.shape for tensor in mask or ())
        self._optimizer.set_hyperparameters(momentum)
        if key not in self._shapes:
            if len(self._shapes) == MOST:
                if not self._full:
                    log.info("runtime.cuda_graph: more than %d shapes of masks; further ones run without graph", MOST)
                self._full = True
                return self._step(images, parts, momentum, graphed=True)
            self._shapes[key] = _Shape(mask)
        if self._images is None:
            self._images = torch.empty_like(images)  # all batches of a run have one shape
        shape, static = self._shapes[key], self._images
        static.copy_(images)
        ours, theirs = ([tensor for tensor in part or () if tensor is not None] for part in (shape.masks, mask))
        if ours:
            torch._foreach_copy_(ours, theirs)

        def step() -> StepOutput:
            return self._step(static, [shape.masks], momentum, graphed=True)

        if shape.warm_ups < WARM_UPS:
            shape.warm_ups += 1
            return self._recorder.warm_up(step)
        if shape.replay is None:
            shape.replay = self._recorder.capture(step)
        return shape.replay()
