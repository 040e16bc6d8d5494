"""Mask sampling: the C++ library, its CUDA twin, or NumPy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch import Tensor

from cjepa_fast.errors import UserError
from cjepa_fast.native import cuda as native_cuda
from cjepa_fast.native import host as native
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskArrays, MaskSpec

_IMAGES_PER_THREAD, _MAX_THREADS = 1024, 8  # below a thousand images a thread costs more than it samples


def mask_sampler(impl: str) -> str:
    """Return the sampler, "native" (C++), "numpy" or "cuda", for impl = "auto" or one of them.

    "auto" is C++, or NumPy with a warning that gives the reason. "auto" never takes the CUDA sampler, which has not run
    on a GPU yet. Raises UserError if the sampler asked for is not available.
    """
    if impl not in ("auto", "native", "numpy", "cuda"):
        raise UserError(f"impl: {impl!r} is not known; use auto, native, numpy or cuda")
    if impl == "numpy":
        return impl
    if impl == "cuda":
        if reason := native_cuda.why_unavailable():
            raise UserError(f"impl: cuda is not available ({reason}); use auto")
        return impl
    reason = native.why_unavailable()
    if reason is None:
        return "native"
    if impl == "native":
        raise UserError(f"impl: native is not available ({reason}); install a C++ compiler or use numpy")
    warnings.warn(
        f"masks are sampled by NumPy, about 20 times slower than by the C++ library: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return "numpy"


def sample_masks(
    spec: MaskSpec, ids: np.ndarray, *, impl: str, inverse: bool = False, union: bool = False
) -> MaskArrays:
    """Return the masks of the samples `ids` [B] int64: see `reference.masks.sample`; `impl` is "native" or "numpy".

    Raises ValueError if `reference.masks.check` refuses the arguments.
    """
    reference_masks.check(spec, ids)
    if impl == "numpy":
        return reference_masks.sample(spec, ids, inverse=inverse, union=union)
    threads = max(1, min(len(ids) // _IMAGES_PER_THREAD, _MAX_THREADS))
    return native.sample_masks(spec, ids, threads, inverse=inverse, union=union)


def sample_masks_on_gpu(spec: MaskSpec, step: Tensor, ids: Tensor, **options: Any) -> native_cuda.DeviceMasks:
    """Return the same masks in one launch, from a step and ids on the GPU: see `native.cuda.sample_masks`.

    Call `mask_sampler("cuda")` first.
    """
    return native_cuda.sample_masks(spec, step, ids, **options)


def mask_workspace(images: int, device: str) -> Tensor:
    """Return memory that calls of `sample_masks_on_gpu` with up to `images` ids may share if none overlap in time."""
    return native_cuda.new_workspace(images, device)
