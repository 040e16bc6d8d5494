"""Samplers for tests, and the comparison of masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from cjepa_fast.masks import MultiBlockSampler

PAPER: dict[str, Any] = {  # I-JEPA, Sec. 3 and appendix A.1
    "target_scale": (0.15, 0.2),
    "target_aspect": (0.75, 1.5),
    "context_scale": (0.85, 1.0),
    "num_targets": 4,
    "min_keep": 10,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "rasterized": {"num_targets": 3},
    "block": {"num_targets": 1, "target_scale": (0.6, 0.6)},
    "random": {"num_targets": 1, "target_scale": (0.6, 0.6)},
}


def make(mode: str = "fixed", grid: int | tuple[int, int] = 14, **arguments: Any) -> MultiBlockSampler:
    """Return a sampler with the paper's numbers, except for `arguments`."""
    return MultiBlockSampler(grid, mode=mode, **(PAPER | ABLATIONS.get(mode, {}) | arguments))


def assert_equal(ours: Any, theirs: Any) -> None:
    """Assert that two `MaskArrays` or `Masks` have the same fields, dtypes and values."""
    for name, a, b in zip(type(theirs)._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
