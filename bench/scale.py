"""A model of the training step on 1 to 1,024 GPUs:  python -m bench.scale --models S B L H g --gpus 8 64 1024

Work, bytes and layout come from the code that trains: FLOP from `cjepa_fast.engine.cost`, parameters from the networks
themselves, and every collective in the order in which FSDP2 and the batch statistics issue it. `--check 1 2 4` runs
the real step in so many processes and compares number, group and bytes of all collectives with the model's, exactly.
How fast GPUs and links are is an input: no default was measured here. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import run, scale_check, trainers
from bench.step_report import text_element
from cjepa_fast import train
from cjepa_fast.config import Config, World
from cjepa_fast.config import schema as config
from cjepa_fast.engine import cost
from cjepa_fast.engine.step import Networks
from cjepa_fast.errors import UserError
from cjepa_fast.ops import variance_covariance_form

Row = dict[str, Any]

MODELS = {**trainers.MODELS, "g": ("ijepa_vit_giant16_in22k", {"loss.vicreg_weight": 0.001})}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
COMPUTE_BOUND = 0.05  # of a step may be exposed communication before that is called the bottleneck

ASSUMPTIONS = (
    "Forward: a unit's weights are gathered while the unit before it computes (FSDP2 is one unit ahead); those of a "
    "network's root and first unit are waited for, as FSDP2 starts a network behind all earlier work.",
    "Backward: a unit's gradients are reduced while the unit before it computes, and are waited for one unit later "
    "(FSDP2 keeps one such buffer); averages over copies of the state are waited for at the end alone.",
    "Batch statistics hide behind nothing.",
    "Collectives on one kind of link follow each other; NVLink and network work side by side.",
    "Rings: all-gather and reduce-scatter move (n-1)/n of the bytes, all-reduce twice that, or along a tree where that "
    "is sooner. Across nodes a group uses the network cards of all its GPUs.",
    "Left out: the feed, launches by the host, copies in and out of FSDP2's buffers, and what a collective takes from "
    "the products beside it.",
)  # fmt: skip


class Machine(NamedTuple):
    """Inputs: one GPU and the links between them. All assumed, not measured; origin at the flags."""

    tflop_s: float = 989.0
    fraction: float = 0.4
    memory_gb: float = 141.0
    memory_gb_s: float = 4800.0
    gpus_per_node: int = 8
    intra_gb_s: float = 450.0
    inter_gb_s: float = 50.0
    base_us: float = 8.0
    intra_us: float = 1.0
    inter_us: float = 5.0


ORIGINS = {
    "tflop_s": "peak of dense bf16 products, NVIDIA H200 data sheet",
    "fraction": "of that peak which a step reaches, assumed; CAPI's authors report 0.58 at 3 B parameters on A100",
    "memory_gb": "memory of a GPU in 10^9 bytes, NVIDIA H200 data sheet",
    "memory_gb_s": "memory bandwidth, NVIDIA H200 data sheet",
    "gpus_per_node": "as in NVIDIA's HGX H200 with 8 GPUs",
    "intra_gb_s": "NVLink per GPU and direction, NVIDIA H200 data sheet: 900 GB/s in both",
    "inter_gb_s": "network per GPU and direction: one card of 400 Gb/s for each, as in NVIDIA's DGX H200",
    "base_us": "of a collective beside its hops, of the order of NCCL's own model (src/graph/tuning.cc)",
    "intra_us": "of a hop within a node, of the same order",
    "inter_us": "of a hop between nodes, of the same order",
}


class Operation(NamedTuple):
    """Something a step does: `work` (milliseconds of one GPU) or a collective among `size` ranks, each `stride`th.

    bytes: what an all-gather delivers, a reduce-scatter takes or an all-reduce sums on each rank.
    phase: of work, the phase; of a collective, what it is for.
    starts: work that came before must have ended when this collective starts (else: when the last work started).
    """

    kind: str
    phase: str
    milliseconds: float = 0.0
    bytes: int = 0
    size: int = 1
    stride: int = 1
    starts: bool = False


class Unit:
    """Parameters that FSDP2 gathers and reduces together, and whether they are gathered now."""

    def __init__(self, parameters: Sequence[nn.Parameter], blocks: int, element_size: int) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.blocks, self.element_size, self.gathered = blocks, element_size, False

    def elements(self, shards: int) -> int:
        """With what fills up each parameter's first dimension to a multiple of `shards`."""
        return sum(math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) for shape in self.shapes)


class Network:
    """The units of one network in forward order, the root's rest first."""

    def __init__(
        self, network: nn.Module, blocks: Sequence[nn.Module], unit: int, *, reshard: bool, element_size: int
    ) -> None:
        groups = [list(blocks[start : start + unit]) for start in range(0, len(blocks), unit)]
        inside = {parameter for block in blocks for parameter in block.parameters()}
        rest = [parameter for parameter in network.parameters() if parameter not in inside]
        self.reshard = reshard
        self.root = Unit(rest, 0 if groups else 1, element_size)
        self.units = [
            Unit([p for block in group for p in block.parameters()], len(group), element_size) for group in groups
        ]
        self.blocks = sum(unit.blocks for unit in (self.root, *self.units))


class Step:
    """The operations of one training step of one rank, in the order in which they are issued."""

    def __init__(
        self, c: Config, world: World, *, reshard: bool, checkpoint: bool, tokens: tuple[float, float],
        machine: Machine, kernels: str, networks: Networks | None = None,
    ) -> None:  # fmt: skip
        self.c, self.world, self.machine, self.kernels = c, world, machine, kernels
        self.shards = config.shard_size(c, world)
        self.images = c.optim.batch_size // world.size
        self.checkpoint = checkpoint
        networks = networks or shapes(c)
        size = networks.encoder.dtype.itemsize
        unit = c.runtime.fsdp_blocks
        encoder, predictor, target = networks.encoder, networks.predictor, networks.target_encoder
        self.encoder = Network(encoder, list(encoder.blocks), unit, reshard=reshard, element_size=size)
        self.predictor = Network(predictor, list(predictor.predictor_blocks), unit, reshard=reshard, element_size=size)
        self.target = Network(target, list(target.blocks), unit, reshard=True, element_size=size)
        self.projector = None
        if networks.projector is not None:
            self.projector = Network(networks.projector, [], 1, reshard=False, element_size=4)
        self.flop = cost.gflop_per_image(c, context_tokens=tokens[0], target_tokens=tokens[1])
        self.count = cost.parameters(c)

    def operations(self) -> Iterator[Operation]:
        parts = self.c.runtime.accumulate
        share = 1 / parts
        for _ in range(parts):
            yield from self._forward(self.target, "target", self.flop.target * share)
        if parts > 1 and self.projector is not None:
            # a first pass without gradient, for the means that the batch statistics are of
            for _ in range(parts):
                yield from self._student(share)
            yield from self._regularisation()
        for _ in range(parts):
            yield from self._student(share)
            if parts == 1 and self.projector is not None:
                yield from self._regularisation()
            yield from self._backward(self.predictor, self.flop.predictor * share)
            yield from self._backward(self.encoder, self.flop.context * share)
        # AdamW: weight, two moments and gradient read, all but the gradient written; EMA: its average, both ways
        moved = (28 * self.count.trained + 8 * self.count.encoder) / self.shards
        yield Operation("work", "optimizer", moved / self.machine.memory_gb_s / 1e6)

    def _student(self, share: float) -> Iterator[Operation]:
        yield from self._forward(self.encoder, "forward", self.flop.context / 3 * share)
        yield from self._forward(self.predictor, "forward", self.flop.predictor / 3 * share)

    def _regularisation(self) -> Iterator[Operation]:
        """Projector and VICReg terms, forward and backward."""
        assert self.projector is not None
        yield from self._forward(self.projector, "forward", self.flop.projector / 3)
        yield from self._statistics()
        yield from self._backward(self.projector, self.flop.projector)

    def _statistics(self) -> Iterator[Operation]:
        """What `cjepa_fast.losses` and `cjepa_fast.ops.variance_covariance` sum or gather over all ranks."""
        ranks, loss = self.world.size, self.c.loss
        if ranks == 1:
            return
        width = loss.projector_width or self.projector_width()
        views = self.c.mask.num_targets if loss.vicreg_views == "target_blocks" else 1

        def summed(bytes: int, kind: str = "all-reduce") -> Operation:
            return Operation(kind, "batch statistics", bytes=bytes, size=ranks, starts=True)

        for _ in range(2 * (loss.projector_layers - 1)):  # batch norm forward and, with equal bytes, backward
            yield summed(2 * 8 * width)
        form = variance_covariance_form(self.images, width, ranks, 4)
        if form == "gram":
            yield summed(4 * self.images * ranks * views * width, "all-gather")
            yield summed(4 * views * (1 if self.kernels == "eager" else 2))
        else:
            yield summed(4 * views * width)
            if self.kernels == "eager":
                yield summed(4 * views * width**2)
            else:
                for bytes in _triton_products(self.images, views, width):
                    yield summed(bytes)
        yield summed(4)

    def projector_width(self) -> int:
        assert self.projector is not None
        return self.projector.root.shapes[0][0]

    def _forward(self, network: Network, phase: str, gflop: float) -> Iterator[Operation]:
        for index, unit in enumerate((network.root, *network.units)):
            yield from self._gather(unit, starts=index == 0)
            if unit.blocks:
                yield self._work(phase, gflop * unit.blocks / network.blocks)
            if network.reshard and unit is not network.root:
                unit.gathered = False
        if network.reshard:
            network.root.gathered = False

    def _backward(self, network: Network, gflop: float) -> Iterator[Operation]:
        """gflop: of forward and backward; the backward pass is two thirds, all of it with recomputation."""
        backward = gflop * (1 if self.checkpoint and network is not self.projector else 2 / 3)
        yield from self._gather(network.root)
        for unit in reversed(network.units):
            yield from self._gather(unit)
            yield self._work("backward", backward * unit.blocks / network.blocks)
            yield from self._reduce(unit)
        if not network.units:
            yield self._work("backward", backward)
        yield from self._reduce(network.root)

    def _work(self, phase: str, gflop: float) -> Operation:
        milliseconds = gflop * self.images / (self.machine.tflop_s * self.machine.fraction)
        return Operation("work", phase, milliseconds)

    def _gather(self, unit: Unit, *, starts: bool = False) -> Iterator[Operation]:
        if self.shards > 1 and not unit.gathered:
            bytes = unit.elements(self.shards) * unit.element_size
            yield Operation("all-gather", "gather", bytes=bytes, size=self.shards, starts=starts)
        unit.gathered = True

    def _reduce(self, unit: Unit) -> Iterator[Operation]:
        """In fp32: over the ranks of a copy, then their shards over the copies."""
        unit.gathered = False
        bytes, copies = 4 * unit.elements(self.shards), self.world.size // self.shards
        if self.shards > 1:
            yield Operation("reduce-scatter", "gradient reduction", bytes=bytes, size=self.shards)
        if copies > 1:
            yield Operation(
                "all-reduce", "gradient reduction", bytes=bytes // self.shards, size=copies, stride=self.shards
            )


def _triton_products(images: int, views: int, width: int) -> Iterator[int]:
    """Bytes of each sum of the covariance's tiles, as the kernel's schedule cuts them."""
    from cjepa_fast.kernels import variance_covariance as kernel

    tile, tiles, _, group, _ = kernel._product_schedule(torch.float32, width, width, images, views)
    block = tile["BLOCK"]
    size = tiles * block**2 + math.ceil(width / block) * block
    for start in range(0, views, group):
        yield 4 * min(group, views - start) * size


@functools.lru_cache(maxsize=4)
def _shapes(c: Config) -> Networks:
    with torch.device("meta"):
        return train.build_networks(c)


def shapes(c: Config) -> Networks:
    """The networks of a configuration without their memory."""
    return _shapes(config.replace(c, {"optim.batch_size": 2, "runtime.kernels": "eager"}))


def spread(size: int, stride: int, machine: Machine) -> tuple[int, int]:
    """Nodes that a group of `size` ranks, each `stride`th, lies on, and how many of it share a node."""
    together = min(size, max(1, machine.gpus_per_node // stride))
    return math.ceil(size / together), together


def collective_ms(kind: str, bytes: int, size: int, stride: int, machine: Machine) -> float:
    """Milliseconds of one collective alone: the base, its hops, and the bytes over the slowest link."""
    nodes, together = spread(size, stride, machine)
    gb_s = machine.intra_gb_s
    if nodes > 1:
        network = together * machine.inter_gb_s
        gb_s = min(gb_s, network) if together > 1 else network
    rounds = 2 if kind == "all-reduce" else 1
    hops_us = (size - nodes) * machine.intra_us + (nodes - 1) * machine.inter_us
    ring_us = rounds * (hops_us + (size - 1) / size * bytes / gb_s / 1e3)
    if kind == "all-reduce":
        hops_us = (together - 1) * machine.intra_us + math.ceil(math.log2(nodes)) * machine.inter_us
        ring_us = min(ring_us, 2 * (hops_us + bytes / gb_s / 1e3))
    return (machine.base_us + ring_us) / 1e3


def lay_out(operations: Iterator[Operation], machine: Machine) -> dict[str, float]:
    """Milliseconds of each phase of work, and of each kind of communication that work waits for.

    Their sum is the step. A wait is called by what is waited for and the link that it crosses.
    """
    found: dict[str, float] = {}
    now = started = 0.0  # when the last work ends, and when it started
    free = {"NVLink": 0.0, "network": 0.0}
    gathered: tuple[float, str] = (0.0, "")
    reduced: tuple[float, str] = (0.0, "")
    open_until: dict[str, float] = {}

    def wait(end: float, name: str) -> None:
        nonlocal now
        if end > now:
            found[name] = found.get(name, 0.0) + end - now
            now = end

    for operation in operations:
        if operation.kind == "work":
            if operation.phase == "optimizer":
                for name, end in sorted(open_until.items(), key=lambda item: item[1]):
                    wait(end, name)
            wait(*gathered)
            started = now
            now += operation.milliseconds
            found[operation.phase] = found.get(operation.phase, 0.0) + operation.milliseconds
            continue
        over = "NVLink" if spread(operation.size, operation.stride, machine)[0] == 1 else "network"
        name = f"{operation.phase} over {over}"
        took = collective_ms(operation.kind, operation.bytes, operation.size, operation.stride, machine)
        if operation.kind == "reduce-scatter":
            wait(*reduced)
        earliest = started if operation.phase == "gather" and not operation.starts else now
        if operation.kind == "all-reduce" and operation.phase == "gradient reduction":
            earliest = max(earliest, reduced[0])
        end = free[over] = max(earliest, free[over]) + took
        if operation.phase == "gather":
            gathered = (end, name)
        elif operation.phase == "batch statistics":
            wait(end, name)
        else:
            open_until[name] = end
            if operation.kind == "reduce-scatter":
                reduced = (end, name)
    return found


def bottleneck(phases: dict[str, float]) -> str:
    """Compute, or the communication that work waits for longest, once such waits take `COMPUTE_BOUND` of the step."""
    waits = {name: milliseconds for name, milliseconds in phases.items() if " over " in name}
    if sum(waits.values()) < COMPUTE_BOUND * sum(phases.values()):
        return "compute"
    return max(waits, key=lambda name: waits[name])


def row(model: str, gpus: int, images: int, machine: Machine, changes: dict[str, Any]) -> Row:
    """The step of `gpus` GPUs with `images` each, laid out as `cjepa_fast.train` would on such GPUs."""
    preset, differences = MODELS[model]
    c = config.replace(
        trainers.PRESETS[preset],
        {**differences, "mask.mode": "fixed", "model.precision": "bf16", **changes, "optim.batch_size": images * gpus},
    )
    local = min(gpus, machine.gpus_per_node)
    world = World(size=gpus, local_size=local)
    config.validate(c)
    config.validate_world(c, gpus)
    tokens = train.build_sampler(c).expected_tokens()
    saving = cost.save_memory(c, world, machine.memory_gb, *tokens)
    step = Step(
        c, world, reshard=saving.reshard, checkpoint=saving.checkpoint, tokens=tokens, machine=machine, kernels="triton"
    )
    operations = list(step.operations())
    phases = lay_out(iter(operations), machine)
    total = sum(phases.values())
    sent: dict[str, int] = {}
    for operation in operations:
        if operation.kind != "work":
            sent[operation.phase] = sent.get(operation.phase, 0) + operation.bytes
    return {
        "model": model, "gpus": gpus, "images_per_gpu": images, "shards": step.shards,
        "layout": f"{cost.layout(c, world)}; {saving.reason}",
        "collectives": sum(operation.kind != "work" for operation in operations), "bytes": sent,
        "phases_ms": phases, "exposed_ms": sum(ms for name, ms in phases.items() if " over " in name),
        "step_ms": total, "images_s": images * gpus / total * 1e3, "bottleneck": bottleneck(phases),
    }  # fmt: skip


def rows(
    models: Sequence[str], gpus: Sequence[int], images: int | None, machine: Machine, changes: Row,
    batch: int | None = None,
) -> list[Row]:  # fmt: skip
    """One row a model and number of GPUs, with `images` each, or `batch` over all.

    `efficiency` is images a second and GPU over those of one GPU alone, which has `images`.
    """
    found = []
    for model in models:
        own = images or (64 if model == "g" else 128)
        alone = row(model, 1, own, machine, {**changes, "runtime.shard_size": None})["images_s"]
        for count in gpus:
            found.append(row(model, count, own if batch is None else batch // count, machine, changes))
            found[-1]["efficiency"] = found[-1]["images_s"] / count / alone
    return found


PHASES = ("target", "forward", "backward", "optimizer")


def table(found: Sequence[Row]) -> list[str]:
    waits = ("gather", "gradient reduction", "batch statistics")
    lines = [
        "| model | GPUs | images/GPU | shards | " + " | ".join(PHASES) + " | waits: "
        + " | ".join(waits) + " | step ms | efficiency | images/s | first bottleneck |",
        "| --- |" + " --: |" * (len(PHASES) + len(waits) + 6) + " --- |",
    ]  # fmt: skip
    for row in found:
        phases = row["phases_ms"]
        cells = [phases.get(name, 0.0) for name in PHASES]
        cells += [sum(ms for key, ms in phases.items() if key.startswith(f"{name} over ")) for name in waits]
        lines.append(
            f"| {row['model']} | {row['gpus']:,} | {row['images_per_gpu']} | {row['shards']} | "
            + " | ".join(f"{cell:.3g}" for cell in cells)
            + f" | {row['step_ms']:.4g} | {row['efficiency']:.1%} | {row['images_s']:,.0f} | {row['bottleneck']} |"
        )
    return lines


def figure(found: Sequence[Row], title: str) -> str:
    """Efficiency over the number of GPUs (log scale), a line a model, as an SVG drawing."""
    left, top, wide, high, right = 60, 50, 520, 240, 60
    colours = ("#3465a4", "#2f7d4f", "#b5482f", "#75507b", "#8f6a00", "#555753")
    most = max(2, *(row["gpus"] for row in found))
    lowest = min(0.9, *(math.floor(10 * row["efficiency"]) / 10 for row in found))
    highest = max(1.0, *(row["efficiency"] for row in found))

    def x(gpus: int) -> float:
        return left + wide * math.log2(gpus) / math.log2(most)

    def y(efficiency: float) -> float:
        return top + high * (highest - efficiency) / (highest - lowest)

    parts = []
    for count in sorted({row["gpus"] for row in found}):
        parts.append(text_element(x(count), top + high + 18, f"{count:,}", anchor="middle"))
    apart = 2 if highest - lowest < 0.3 else 10
    for percent in range(round(100 * lowest), round(100 * highest) + 1, apart):
        level = y(percent / 100)
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{level:.1f}" y2="{level:.1f}" stroke="#d3d7cf"/>')
        parts.append(text_element(left - 8, level + 4, f"{percent}%", anchor="end"))
    for index, model in enumerate(dict.fromkeys(row["model"] for row in found)):
        own = sorted((row for row in found if row["model"] == model), key=lambda row: row["gpus"])
        points = " ".join(f"{x(row['gpus']):.1f},{y(row['efficiency']):.1f}" for row in own)
        colour = colours[index % len(colours)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{left + 8 + 70 * index}" y="{top + high + 32}" width="14" height="4" fill="{colour}"/>')
        parts.append(text_element(left + 28 + 70 * index, top + high + 39, f"ViT-{model}"))
    width, height = left + wide + right, top + high + 56
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        f"{text_element(8, 20, title)}\n"
        f"{text_element(8, 38, 'images a second and GPU over those of one GPU, by number of GPUs')}\n{body}\n</svg>\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["S", "B", "L", "H", "g"], help="[all]")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help="[1 to 1024]")
    parser.add_argument("--images", type=int, help="images per GPU [128, of g 64]")
    parser.add_argument("--batch", type=int, help="images of a step, to be shared by any number of GPUs, instead")
    parser.add_argument("--shard-size", type=int, help="runtime.shard_size [a node]")
    parser.add_argument("--reshard", choices=("auto", "never", "always"), default="auto", help="[auto]")
    parser.add_argument("--fsdp-blocks", type=int, default=4, help="[4]")
    parser.add_argument("--accumulate", type=int, default=1, help="[1]")
    for name, default in Machine()._asdict().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{ORIGINS[name]} [{default:g}]"
        )
    parser.add_argument("--json", type=Path, help="write the record")
    parser.add_argument("--figure", type=Path, help="draw the efficiency (SVG)")
    parser.add_argument("--check", nargs="+", type=int, metavar="N", help="run the step in N processes and compare")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return scale_check.main(arguments.check)
    machine = Machine(**{name: getattr(arguments, name) for name in Machine._fields})
    if arguments.batch is not None and (uneven := [count for count in arguments.gpus if arguments.batch % count]):
        parser.error(f"--batch {arguments.batch} is not a multiple of {uneven[0]} GPUs")
    changes = {
        "runtime.shard_size": arguments.shard_size, "runtime.reshard": arguments.reshard,
        "runtime.fsdp_blocks": arguments.fsdp_blocks, "runtime.accumulate": arguments.accumulate,
    }  # fmt: skip
    try:
        found = rows(arguments.models, arguments.gpus, arguments.images, machine, changes, arguments.batch)
    except UserError as error:
        parser.error(str(error))
    print("A model, not a measurement. Inputs, all assumed, not measured:")
    inputs = [f"{name} {value:g}: {ORIGINS[name]}" for name, value in machine._asdict().items()]
    print("\n".join(f"  {line}" for line in inputs))
    print("\n".join(ASSUMPTIONS))
    print("\n" + "\n".join(table(found)))
    if arguments.json is not None:
        record = {
            "environment": run.environment("cpu"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "measured": False,
            "machine": machine._asdict(), "origins": ORIGINS, "assumptions": ASSUMPTIONS, "changes": changes,
            "rows": found,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.figure is not None:
        rate = f"{machine.tflop_s:g} TFLOP/s at {machine.fraction:.0%}"
        title = f"Modelled, not measured: {rate}, {machine.gpus_per_node} GPUs a node"
        arguments.figure.write_text(figure(found, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
