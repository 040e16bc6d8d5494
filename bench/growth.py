"""The growth of a step's time and memory with batch, tokens, depth and width:  python -m bench.growth --json FILE

On the CPU, with small models. The exponent of a quantity is the slope of its logarithm over that of the size, by least
squares. Time is the median over rounds in which all sizes take turns. Memory is the bytes that one step saves for its
backward pass: counted, so the figure repeats exactly. Beside each stands the exponent that the method's FLOP and saved
bytes have over the same sizes. A step may grow more slowly, as small products reach less of the processor's rate. A
step that grows faster by more than `MARGIN` does unexpected work: exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import flop, records
from bench.records import Row
from bench.step import trainers
from cjepa_fast import config
from cjepa_fast.config import Config
from cjepa_fast.config.presets import PRESETS

MARGIN = 0.15  # of an exponent; a hidden product over all pairs would add 1
_TURN_S = 0.3  # least length of a turn
_WIDTH, _DEPTH, _SIDE, _BATCH = 192, 4, 128, 8  # sizes while another grows; the side in pixels, patches of 16

AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32), "tokens": (96, 128, 192, 256), "depth": (2, 4, 8, 16), "width": (96, 192, 384, 768),
}  # fmt: skip
_QUICK = {"batch": (4, 8), "tokens": (96, 128), "depth": (2, 4), "width": (96, 192)}


class Size(NamedTuple):
    """Images of a step, side of an image in pixels, depth and width of the encoder. The predictor has half of both."""

    batch: int = _BATCH
    tokens: int = _SIDE
    depth: int = _DEPTH
    width: int = _WIDTH


class Grown(NamedTuple):
    """A trainer and a batch of one size, and the FLOP and saved bytes of the method."""

    size: int  # along its axis; patches for tokens
    trainer: Any
    batch: Any
    gflop: float
    model_bytes: float


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent p of values ~ sizes^p, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    centre = statistics.fmean(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def configure(size: Size) -> Config:
    """Return C-JEPA's recipe around an encoder of this size, fp32."""
    return config.replace(
        PRESETS["cjepa_vit_small16_in1k"],
        {
            "model.encoder": "grown", "model.image_size": size.tokens, "model.precision": "fp32",
            "model.predictor_depth": size.depth // 2, "model.predictor_width": size.width // 2, "mask.min_keep": 4,
            "optim.batch_size": size.batch,
        },
    )  # fmt: skip


def build(axis: str, value: int) -> Grown:
    """Build our step of one size, as `bench.step` does, with a batch of random images."""
    size = Size()._replace(**{axis: value})
    shape = config.VitShape(size.width, size.depth, 3)
    with mock.patch.dict(config.ENCODERS, {"grown": shape}):
        c = configure(size)
        config.validate(c)
        trainer = trainers.build(trainers.Spec("ours", {}), c, torch.device("cpu"))
        (drawn,) = trainers.sample(c, size.batch, 1)
        context, target = trainers.mean_context(drawn.masks), drawn.masks.target.shape[2]
        gflop = flop.gflop_per_image(c, context_tokens=context, target_tokens=target).total * size.batch
        kept = expected_bytes(c, context, target)
    patches = (size.tokens // c.model.patch_size) ** 2
    return Grown(patches if axis == "tokens" else value, trainer, trainer.batch(drawn), gflop, kept)


def expected_bytes(c: Config, context_tokens: float, target_tokens: float) -> float:
    """Return the bytes that a step in fp32 needs to save for its backward pass.

    A block saves its input, the input of its second half, both norms' outputs, q, k, v, the attention's output, and the
    MLP's hidden values before and after GELU: (8 + 2 mlp_ratio) D values a token, and a few statistics. The predictor's
    first block saves inputs and norms once for each unique token, its last block only what target tokens need.
    """
    encoder, predictor = flop.shapes(c)
    wide, narrow, hidden = encoder.width, predictor.width, round(predictor.width * predictor.mlp_ratio)
    images, blocks = c.optim.batch_size, c.mask.num_targets
    patches = (c.model.image_size // c.model.patch_size) ** 2
    context, targets = images * context_tokens, images * blocks * target_tokens
    tokens = blocks * context + targets  # of the predictor

    def kept(shape: config.VitShape, tokens: float) -> float:
        values = 8 * shape.width + 2 * round(shape.width * shape.mlp_ratio)
        return shape.depth * tokens * (4 * values + 4 * shape.heads + 16)

    encoded = kept(encoder, context) + 4 * context * (2 * wide + 3 * c.model.patch_size**2)
    first = 2 * narrow * (tokens - context - patches)
    last = (5 * narrow + 2 * hidden) * (tokens - targets) - narrow * targets
    ends = narrow * (tokens + targets) + wide * targets + 2 * wide * targets  # around the blocks, and the loss
    predicted = kept(predictor, tokens) + 4 * (ends - first - last)
    projected = flop.projector_widths(c)
    statistics = blocks * min(images, projected[-1]) ** 2  # Gram form for few images
    layers = images * blocks * (wide + 2 * sum(projected) - projected[-1])
    return encoded + predicted + 4 * (layers + statistics)


def saved_bytes(grown: Grown) -> int:
    """Count the bytes that autograd saves for the backward pass of one step, weights left out, each memory once."""
    weights = {p.untyped_storage().data_ptr() for p in grown.trainer.networks.state_dict(keep_vars=True).values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (start := tensor.untyped_storage().data_ptr()) not in weights:
            kept[start] = tensor  # a reference, or another tensor might get this memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grown.trainer.step(grown.batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def take_turns(grown: Sequence[Grown], rounds: int) -> list[float]:
    """Return the median milliseconds a step of each size."""
    times: list[list[float]] = [[] for _ in grown]
    steps = []
    for one in grown:
        one.trainer.step(one.batch)
        steps.append(max(1, round(_TURN_S / _seconds(one, 1))))
    for turn in range(rounds):
        for index in range(len(grown)):
            which = (index + turn) % len(grown)  # the order turns: the step before leaves its heat and its cache
            times[which].append(1e3 * _seconds(grown[which], steps[which]))
    return [statistics.median(milliseconds) for milliseconds in times]


def _seconds(grown: Grown, steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        grown.trainer.step(grown.batch)
    return (time.perf_counter() - begun) / steps


def measure(axis: str, values: Sequence[int], rounds: int) -> Row:
    """Measure one axis: times, bytes, exponents and the verdict."""
    grown = [build(axis, value) for value in values]
    sizes = [one.size for one in grown]
    kept = [saved_bytes(one) for one in grown]
    times = take_turns(grown, rounds)
    return {
        "axis": axis, "sizes": sizes, "rounds": rounds, "median_ms": times, "saved_bytes": kept,
        "gflop": [one.gflop for one in grown], "model_bytes": [one.model_bytes for one in grown],
        **exponents(sizes, times, kept, [one.gflop for one in grown], [one.model_bytes for one in grown]),
    }  # fmt: skip


def exponents(
    sizes: Sequence[float], times: Sequence[float], kept: Sequence[float], gflop: Sequence[float],
    model_bytes: Sequence[float],
) -> Row:  # fmt: skip
    """Return measured and expected exponents, and a surprise where a measured one is larger by more than `MARGIN`."""
    found = {
        "time": slope(sizes, times), "time_expected": slope(sizes, gflop),
        "memory": slope(sizes, kept), "memory_expected": slope(sizes, model_bytes),
    }  # fmt: skip
    surprises = [name for name in ("time", "memory") if not found[name] <= found[f"{name}_expected"] + MARGIN]
    return {**found, "verdict": f"surprise: {' and '.join(surprises)}" if surprises else "no surprise"}


def table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        sizes, times, kept = (
            " ".join(f"{value / unit:,.4g}" for value in row[key])
            for key, unit in (("sizes", 1), ("median_ms", 1), ("saved_bytes", 1e6))
        )
        time, flops, memory, expected = (
            f"{row[name]:.2f}" for name in ("time", "time_expected", "memory", "memory_expected")
        )
        lines.append([row["axis"], sizes, times, time, flops, kept, memory, expected, row["verdict"]])
    columns = "grows|sizes|ms a step|>exponent of time|>of FLOP|MB saved for backward|>exponent of memory|>of the model"
    return records.table(f"{columns}|verdict", lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="[all]")
    parser.add_argument("--rounds", type=int, help="turns of each size [7]")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; on a busy CPU several threads wait for each other [1]"
    )
    parser.add_argument("--json", type=Path, help="write the record")
    parser.add_argument("--quick", action="store_true", help="two sizes, two rounds: a trial run")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (2 if arguments.quick else 7)
    sizes = _QUICK if arguments.quick else AXES
    record: Row = {
        "environment": records.environment("cpu"), "date": records.now(), "quick": arguments.quick, "margin": MARGIN,
        "fixed": Size()._asdict(), "rows": [],
    }  # fmt: skip
    print("\n".join(table([])))
    for axis in arguments.axes:
        record["rows"].append(measure(axis, sizes[axis], rounds))
        print(table(record["rows"][-1:])[-1], flush=True)
        if arguments.json is not None:
            records.write(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0 if all(row["verdict"] == "no surprise" for row in record["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
