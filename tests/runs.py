"""What tests of the main job share: small images to train on, a small run of a few seconds, and what it recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cjepa_fast.train import main

ROOT = Path(__file__).parent.parent
STEPS = 12
SMALL = (
    "--model.encoder vit_demo --model.image-size 24 --model.patch-size 4 --model.predictor-depth 1 "
    "--model.predictor-width 48 --model.precision fp32 --mask.target-scale 0.15 0.2 --mask.min-keep 3 "
    "--mask.context-keep None --loss.vicreg-weight 0.01 "
    f"--optim.batch-size 8 --optim.steps {STEPS} --optim.warmup-epochs 0.2 --run.log-every 1 --run.checkpoint-every 7 "
    "--runtime.data-threads 1 --runtime.device cpu"
).split()  # fmt: skip
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


def run(images: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """Train as `SMALL` and `more` say; return the metrics."""
    assert main([*SMALL, "--data.root", str(images), "--run.dir", str(out), *more]) == 0
    return metrics(out)


def tensors(step: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The state in a checkpoint's folder, by name."""
    dcp_to_torch_save(step, scratch)
    return torch.load(scratch)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "cjepa_fast.train", *arguments], capture_output=True, text=True, env=environment, timeout=200
    )  # fmt: skip
