"""What tests of masks share."""

from __future__ import annotations

from typing import Any

from cjepa_fast.masks import MultiBlockSampler

ABLATIONS: dict[str, dict[str, Any]] = {
    "rasterized": {"num_targets": 3},
    "block": {"num_targets": 1, "target_scale": (0.6, 0.6)},
    "random": {"num_targets": 1, "target_scale": (0.6, 0.6)},
}


def make(mode: str, grid: int | tuple[int, int] = 14, **arguments: Any) -> MultiBlockSampler:
    return MultiBlockSampler(grid, mode, **(ABLATIONS.get(mode, {}) | arguments))
