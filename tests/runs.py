"""What tests of the main job share: small images to train on, and what a run recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLOCKS = {"images_per_s", "data_wait_ms"}


def write_images(root: Path, count: int, labels: Sequence[str] = ("",)) -> Path:
    """JPEGs of 35 x 30 pixels, `count` in the folder of each label; without labels in `root` itself."""
    generator = np.random.default_rng(0)
    for label in labels:
        (root / label).mkdir(exist_ok=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((35, 30)).save(root / label / f"{i}.jpg")
    return root


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is the same in every run of one configuration."""
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
