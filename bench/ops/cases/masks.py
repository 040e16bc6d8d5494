"""Mask sampling for a batch of B images, in every mode; what counts is images per second, and that nobody waits for it.

No traffic model: a batch is a few hundred kilobytes, so launches and latency decide. C++ and NumPy are timed by the
host's clock, the CUDA sampler (one launch, no host synchronisation) on the GPU. "published style" is the usual PyTorch
collator: image by image, a few tiny tensors per block; it draws other random numbers, so its masks are not compared.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.ops.cases import Case, Variant
from bench.timing import Inputs
from cjepa_fast.native import cuda as native_cuda
from cjepa_fast.native import host as native
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskSpec, Mode

DTYPE = "int16"
TESTS = ("test_masks.py", "test_mask_samplers.py", "test_mask_cuda.py", "test_native.py")
# grid: frequent target block, the faithful context window, context length of fixed mode
GRIDS = {14: ((6, 6), (13, 13), 51), 16: ((7, 6), (15, 15), 70)}
PUBLISHED = (Mode.FIXED, Mode.FAITHFUL)  # the modes of four blocks and a context of one length


def spec_of(mode: Mode, grid: int, batch: int) -> MaskSpec:
    """The sizes that a training step of this mode has; context and target of about the same share everywhere."""
    (target_h, target_w), window, keep = GRIDS[grid]
    patches, targets, cap = grid * grid, 4, 0
    if mode in (Mode.FIXED, Mode.PACKED):
        window = (grid, grid)
        cap = batch * patches // 2 if mode == Mode.PACKED else 0
    elif mode == Mode.RASTERIZED:
        targets, target_h, target_w = 3, grid // 2, grid // 2
        window, keep = (target_h, target_w), target_h * target_w
    elif mode in (Mode.BLOCK, Mode.RANDOM):
        targets, window = 1, (grid, grid)
        target_h, target_w = (grid * 3 // 4, grid * 3 // 4) if mode == Mode.BLOCK else (1, patches // 2)
        keep = patches - target_h * target_w
    return MaskSpec(1, 2, mode, grid, grid, targets, target_h, target_w, *window, min_keep=10, keep=keep, cap=cap)


def published_style(spec: MaskSpec, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Context [B, Kc] and target [B, M, Kt] indices from torch's global generator."""

    def block(h: int, w: int) -> Tensor:
        top, left = torch.randint(spec.height - h + 1, (1,)), torch.randint(spec.width - w + 1, (1,))
        inside = torch.zeros(spec.height, spec.width, dtype=torch.int32)
        inside[top : top + h, left : left + w] = 1
        return inside

    contexts, targets = [], []
    for _ in ids:
        complements = []
        for _ in range(spec.num_targets):
            inside = block(spec.target_h, spec.target_w)
            targets.append(inside.flatten().nonzero().squeeze(1))
            complements.append(torch.ones_like(inside) - inside)
        context = block(spec.context_h, spec.context_w)
        for complement in complements:
            context = context * complement
        contexts.append(context.flatten().nonzero().squeeze(1))
    shortest = min(len(context) for context in contexts)
    target = torch.stack(targets).unflatten(0, (len(ids), spec.num_targets))
    return torch.stack([context[:shortest] for context in contexts]), target


def compared(masks: Any, mode: Mode) -> list[Tensor]:
    """What all samplers give in one layout: the CUDA sampler cannot cut faithful contexts without asking the host."""
    arrays = [masks.target, masks.counts, *([] if mode == Mode.FAITHFUL else [masks.context]),
              *([masks.offsets] if mode == Mode.PACKED else [])]  # fmt: skip
    return [torch.as_tensor(array) for array in arrays]


def on_gpu(spec: MaskSpec, ids: np.ndarray, step: Tensor, device_ids: Tensor, workspace: Tensor) -> Any:
    return native_cuda.sample_masks(spec, step, device_ids, workspace=workspace)


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    threads = min(8, len(os.sched_getaffinity(0)))
    no_cuda, no_native = native_cuda.why_unavailable(), native.why_unavailable()
    batches = (32,) if quick else (128, 2048)
    for batch in batches:
        for grid in GRIDS:
            for mode in Mode:
                spec = spec_of(mode, grid, batch)
                numpy = functools.partial(_ignoring_rest, functools.partial(reference_masks.sample, spec))

                def inputs(batch: int = batch) -> Inputs:
                    ids = np.arange(batch)
                    if no_cuda:
                        return (ids,)
                    step = torch.tensor([2], dtype=torch.int32, device="cuda")
                    return ids, step, torch.from_numpy(ids).cuda(), native_cuda.new_workspace(batch, "cuda")

                view = functools.partial(compared, mode=mode)
                variants = [
                    Variant(name="cuda", call=functools.partial(on_gpu, spec), role="ours", obstacle=no_cuda,
                            compared=view),
                    *(
                        Variant(
                            name=f"C++, {count} thread" + "s" * (count > 1), role="ours", obstacle=no_native,
                            call=functools.partial(_ignoring_rest, functools.partial(_native, spec, count)),
                            timed="host", compared=view,
                        )
                        for count in dict.fromkeys((1, threads))
                    ),
                    Variant(name="NumPy", call=numpy, timed="host", compared=view),
                ]  # fmt: skip
                if mode in PUBLISHED and batch <= 128:
                    variants.append(Variant(
                        name="published style", timed="host", compared=None,
                        call=functools.partial(_ignoring_rest, functools.partial(published_style, spec)),
                    ))  # fmt: skip

                def truth(ids: np.ndarray, *rest: Any, spec: MaskSpec = spec, view: Any = view) -> list[Tensor]:
                    return view(reference_masks.sample(spec, ids))

                yield Case(
                    name=f"{mode.name.lower()} {grid}x{grid} B={batch}", direction="", inputs=inputs,
                    variants=variants, items=batch, item="images", truth=truth, error_limit=0,
                )  # fmt: skip


def _native(spec: MaskSpec, threads: int, ids: np.ndarray) -> Any:
    return native.sample_masks(spec, ids, threads)


def _ignoring_rest(function: Any, ids: np.ndarray, *rest: Any) -> Any:
    return function(ids)
