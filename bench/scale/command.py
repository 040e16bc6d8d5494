"""A model of the training step on 1 to 1,024 GPUs:  python -m bench.scale --models S B L H g --gpus 8 64 1024

FLOP are the method's (`bench.flop`), parameters those of the networks, and collectives come in the order in which FSDP2
and the batch statistics issue them. `--check 1 2 4` runs the real step in so many processes and compares number, group
and bytes of all collectives with the model's, exactly. The rates of GPUs and links are inputs: no default was measured
here. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence
from pathlib import Path

from bench import plots, records
from bench.records import Row
from bench.scale import check
from bench.scale.machine import ORIGINS, Machine
from bench.scale.operations import Step
from bench.scale.timeline import ASSUMPTIONS, bottleneck, lay_out
from bench.step import trainers
from bench.training import Plan, build_sampler
from cjepa_fast import config
from cjepa_fast.config import World
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.errors import UserError

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {**trainers.MODELS, "g": ("ijepa_vit_giant16_in22k", {"method": "cjepa"})}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WORK = ("target", "forward", "backward", "optimizer")
WAITS = ("gather", "gradient reduction", "batch statistics")


def row(model: str, gpus: int, images: int, machine: Machine, changes: Row, plan: Plan) -> Row:
    """Return the modelled step of `gpus` GPUs with `images` each, under changed keys of the configuration."""
    preset, differences = MODELS[model]
    c = config.replace(
        PRESETS[preset],
        {**differences, "mask.mode": "fixed", "model.precision": "bf16", **changes, "optim.batch_size": images * gpus},
    )
    world = World(size=gpus, local_size=min(gpus, machine.gpus_per_node))
    config.validate(c)
    config.validate_world(c, gpus)
    tokens = build_sampler(c).expected_tokens()
    step = Step(c, world, plan=plan, tokens=tokens, machine=machine, kernels="triton")
    operations = list(step.operations())
    phases = lay_out(iter(operations), machine)
    total = sum(phases.values())
    sent: dict[str, int] = {}
    for operation in operations:
        if operation.kind != "work":
            sent[operation.phase] = sent.get(operation.phase, 0) + operation.bytes
    return {
        "model": model, "gpus": gpus, "images_per_gpu": images, "shards": step.shards,
        "collectives": sum(operation.kind != "work" for operation in operations), "bytes": sent,
        "phases_ms": phases, "exposed_ms": sum(ms for name, ms in phases.items() if " over " in name),
        "step_ms": total, "images_s": images * gpus / total * 1e3, "bottleneck": bottleneck(phases),
    }  # fmt: skip


def rows(
    models: Sequence[str], gpus: Sequence[int], images: int | None, machine: Machine, changes: Row,
    plan: Plan | None = None, batch: int | None = None,
) -> list[Row]:  # fmt: skip
    """Return a row for each model and number of GPUs, with `images` each, or `batch` over all.

    `efficiency` is images a second and GPU over those of one GPU alone, which has `images`.
    """
    found, plan = [], plan or Plan()
    for model in models:
        own = images or (64 if model == "g" else 128)
        alone = row(model, 1, own, machine, {**changes, "runtime.shard_size": None}, plan)["images_s"]
        for count in gpus:
            found.append(row(model, count, own if batch is None else batch // count, machine, changes, plan))
            found[-1]["efficiency"] = found[-1]["images_s"] / count / alone
    return found


def table(found: Sequence[Row]) -> list[str]:
    lines = []
    for row in found:
        phases = row["phases_ms"]
        cells = [phases.get(name, 0.0) for name in WORK]
        cells += [sum(ms for key, ms in phases.items() if key.startswith(f"{name} over ")) for name in WAITS]
        start = [row["model"], f"{row['gpus']:,}", str(row["images_per_gpu"]), str(row["shards"])]
        end = [f"{row['step_ms']:.4g}", f"{row['efficiency']:.1%}", f"{row['images_s']:,.0f}", row["bottleneck"]]
        lines.append([*start, *(f"{cell:.3g}" for cell in cells), *end])
    start, end = "model|>GPUs|>images/GPU|>shards|>", "|>step ms|>efficiency|>images/s|first bottleneck"
    waits = "|>".join(f"wait: {name}" for name in WAITS)
    return records.table(start + "|>".join(WORK) + "|>" + waits + end, lines)


def figure(record: Row) -> Figure:
    """Draw the efficiency over the number of GPUs, a line for each model of a record."""
    drawing = plots.new(6.5, 3.6)
    axis, machine = drawing.subplots(), record["machine"]
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        own = sorted((row for row in record["rows"] if row["model"] == model), key=lambda row: row["gpus"])
        axis.plot([row["gpus"] for row in own], [100 * row["efficiency"] for row in own], label=f"ViT-{model}")
    counts = sorted({row["gpus"] for row in record["rows"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.set_xlabel("GPUs")
    axis.set_ylabel("images/s per GPU, % of one GPU alone")
    axis.set_title(
        f"Modelled, not measured: {machine['tflop_s']:g} TFLOP/s at {machine['fraction']:.0%}, "
        f"{machine['gpus_per_node']:g} GPUs a node", fontsize=10,
    )  # fmt: skip
    axis.grid(axis="y", alpha=0.4)
    axis.legend()
    return drawing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["S", "B", "L", "H", "g"], help="[all]")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help="[1 to 1024]")
    parser.add_argument("--images", type=int, help="images per GPU [128, of g 64]")
    parser.add_argument("--batch", type=int, help="images of a step, shared by any number of GPUs, instead")
    parser.add_argument("--shard-size", type=int, help="runtime.shard_size [a node]")
    parser.add_argument("--accumulate", type=int, default=1, help="runtime.accumulate [1]")
    parser.add_argument("--reshard", action="store_true", help="free gathered weights after the forward pass (ZeRO-3)")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    for name, default in Machine()._asdict().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{ORIGINS[name]} [{default:g}]"
        )
    parser.add_argument("--json", type=Path, help="write the record")
    parser.add_argument("--figure", type=Path, help="draw the efficiency (SVG)")
    parser.add_argument("--check", nargs="+", type=int, metavar="N", help="run the step in N processes and compare")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return check.main(arguments.check)
    machine = Machine(**{name: getattr(arguments, name) for name in Machine._fields})
    if arguments.batch is not None and (uneven := [count for count in arguments.gpus if arguments.batch % count]):
        parser.error(f"--batch {arguments.batch} is not a multiple of {uneven[0]} GPUs")
    changes = {"runtime.shard_size": arguments.shard_size, "runtime.accumulate": arguments.accumulate}
    plan = Plan(reshard=arguments.reshard, recompute=arguments.recompute)
    try:
        found = rows(arguments.models, arguments.gpus, arguments.images, machine, changes, plan, arguments.batch)
        record = {
            "environment": records.environment("cpu"), "date": records.now(), "measured": False,
            "machine": machine._asdict(), "origins": ORIGINS, "assumptions": ASSUMPTIONS,
            "changes": {**changes, **plan._asdict()}, "rows": found,
        }  # fmt: skip
        if arguments.figure is not None:
            records.write(arguments.figure, plots.svg(figure(record)))
    except UserError as error:
        parser.error(str(error))
    print("A model, not a measurement. Inputs, all assumed, not measured:")
    print("\n".join(f"  {name} {value:g}: {ORIGINS[name]}" for name, value in machine._asdict().items()))
    print("\n".join(ASSUMPTIONS))
    print("\n" + "\n".join(table(found)))
    if arguments.json is not None:
        records.write(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0
