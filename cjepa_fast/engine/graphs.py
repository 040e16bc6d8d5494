"""Whole training steps as CUDA graphs, one for each block size: a replay is one launch. Not yet run on a GPU.

What a graph holds is `engine.step.train_step`: both passes, optimizer and averages. It saves the host's time, some
thousand launches a step, so it pays where the GPU waits for the host: small models and small batches. It costs memory:
gradients stay between steps, and backward adds to the zeros in them (16 bytes a parameter more to read and write in
fp32, by count); each graph keeps its outputs; all share the rest, which steps that warm up cannot use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cjepa_fast.engine.optim import AdamW, fuses
from cjepa_fast.engine.step import StepOutput
from cjepa_fast.errors import UserError
from cjepa_fast.masks import Masks

# steps of a shape before its capture: they compile, tune and allocate what lasts, none of which a graph can
WARM_UPS = 2
MOST = 32  # graphs: each keeps its outputs' memory, the predictions above all

log = logging.getLogger(__name__)


class Step(Protocol):
    """`train_step` but for its first arguments."""

    def __call__(
        self, images: Tensor, masks: Sequence[Masks], momentum: float, *, graphed: bool = False
    ) -> StepOutput: ...  # fmt: skip


def require(kernels: str, device: torch.device) -> None:
    """Raises UserError unless steps can be captured on `device` with such `kernels`: to ask before a run."""
    if device.type != "cuda":
        raise UserError(f"runtime.cuda_graph: on needs a GPU, the run is on {device}; use off")
    if not fuses(kernels, device):
        raise UserError("runtime.cuda_graph: on needs the optimizer's Triton kernel, which cannot run; use off")


class Recorder:
    """CUDA's part: the side stream of warm-ups and captures, and the pool of memory that all graphs share.

    A replay may overwrite whatever other graphs of the pool have left there, so what lasts must be allocated outside
    of any capture: state, gradients and inputs are; outputs do not last.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], StepOutput]) -> StepOutput:
        """Runs `step` where it is going to be captured."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = step()
        current.wait_stream(self._stream)
        return out

    def capture(self, step: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        """Records `step` without running it; returns its replay, whose results lie where the last ones lay."""
        graph = torch.cuda.CUDAGraph()
        # the default mode would fail on whatever the threads that decode images ask of CUDA meanwhile
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> StepOutput:
            graph.replay()
            return out

        return replay


class _Shape:
    """What there is for one shape of the inputs."""

    def __init__(self, masks: Masks) -> None:
        self.masks = Masks(*(None if mask is None else torch.empty_like(mask) for mask in masks))  # pyright: ignore[reportArgumentType]
        self.warm_ups = 0
        self.replay: Callable[[], StepOutput] | None = None


class GraphedStep:
    """`train_step` of one process and one micro-batch, replayed where its inputs' shapes are known.

    The first `WARM_UPS` steps of a shape run as they are; they count as any other step does. Then the shape's graph is
    captured, which waits for the GPU once, and every further step is a replay. Beyond `MOST` shapes steps run as they
    are. Steps with and without unions of targets differ in shape.

    The results are overwritten by the next call, of whatever shape: copy or sum up what is to last.
    """

    def __init__(self, step: Step, optimizer: AdamW, recorder: Recorder) -> None:
        self._step, self._optimizer, self._recorder = step, optimizer, recorder
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._images: Tensor | None = None
        self._full = False

    def __call__(self, images: Tensor, masks: Sequence[Masks], momentum: float) -> StepOutput:
        (mask,) = masks
        key = tuple(None if tensor is None else tensor.shape for tensor in mask)
        self._optimizer.set_hyperparameters(momentum)
        if key not in self._shapes:
            if len(self._shapes) == MOST:
                if not self._full:
                    log.info("runtime.cuda_graph: more than %d shapes of masks; further ones run without graph", MOST)
                self._full = True
                return self._step(images, masks, momentum, graphed=True)
            self._shapes[key] = _Shape(mask)
        if self._images is None:
            self._images = torch.empty_like(images)  # of a run all batches are alike
        shape, static = self._shapes[key], self._images
        static.copy_(images)
        ours, theirs = ([tensor for tensor in part if tensor is not None] for part in (shape.masks, mask))
        torch._foreach_copy_(ours, theirs)

        def step() -> StepOutput:
            return self._step(static, [shape.masks], momentum, graphed=True)

        if shape.warm_ups < WARM_UPS:
            shape.warm_ups += 1
            return self._recorder.warm_up(step)
        if shape.replay is None:
            shape.replay = self._recorder.capture(step)
        return shape.replay()
