"""Mask sampling: the C++ library, or its NumPy twin."""

from __future__ import annotations

import warnings

import numpy as np

from cjepa_fast import native, reference_masks
from cjepa_fast.errors import UserError
from cjepa_fast.reference_masks import MaskArrays, MaskSpec

_IMAGES_PER_THREAD, _MAX_THREADS = 1024, 8  # below a thousand images a thread costs more than it samples


def mask_sampler(impl: str) -> str:
    """Which of "native" (C++) and "numpy" is to serve `sample_masks`, for impl = "auto", "native" or "numpy".

    "auto" falls back to NumPy with a warning that says why. Raises UserError for "native" where it cannot be had.
    """
    if impl not in ("auto", "native", "numpy"):
        raise UserError(f"impl={impl!r} is not known: use 'auto', 'native' or 'numpy'")
    if impl == "numpy":
        return impl
    reason = native.why_unavailable()
    if reason is None:
        return "native"
    if impl == "native":
        raise UserError(f"impl='native' cannot be had ({reason}): install a C++ compiler or use impl='numpy'")
    warnings.warn(
        f"masks are sampled by NumPy, about 20 times slower than the C++ core: {reason}", RuntimeWarning, stacklevel=4
    )
    return "numpy"


def sample_masks(
    spec: MaskSpec, ids: np.ndarray, *, impl: str, inverse: bool = False, union: bool = False
) -> MaskArrays:
    """Masks of the samples `ids` [B] int64: see `cjepa_fast.reference_masks.sample`; `impl` is "native" or "numpy".

    Raises ValueError for arguments that are not as documented.
    """
    reference_masks.check(spec, ids)
    if impl == "numpy":
        return reference_masks.sample(spec, ids, inverse=inverse, union=union)
    threads = max(1, min(len(ids) // _IMAGES_PER_THREAD, _MAX_THREADS))
    return native.sample_masks(spec, ids, threads, inverse=inverse, union=union)
