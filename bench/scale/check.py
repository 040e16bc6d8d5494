"""The collectives of the real training step, counted as they happen, beside those of the model.

A dispatch mode sees every operation on a process group, whatever its source: FSDP2, the batch statistics, or an
unexpected operation on DTensors.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.scale.machine import Machine
from bench.scale.operations import Step
from bench.training import Plan, Training
from cjepa_fast import config
from cjepa_fast.config import Config, World
from cjepa_fast.config.presets import PRESETS

STEPS = 2  # the first builds FSDP2's state, the second is like all later ones
_IMAGES = 8  # of a process

Key = tuple[str, int, int]  # kind, ranks of the group, their distance
Counts = dict[Key, tuple[int, int]]  # collectives and bytes


class Layout(NamedTuple):
    """Number of processes, changed keys, and choices of memory against time."""

    processes: int
    changes: dict[str, Any] = {}  # noqa: RUF012  a tuple's default, never changed
    plan: Plan = Plan()


LAYOUTS = {
    "alone": Layout(1),
    "alone, accumulate 2": Layout(1, {"runtime.accumulate": 2}),
    "2, ZeRO-2": Layout(2),
    "2, ZeRO-3": Layout(2, plan=Plan(reshard=True)),
    "2, unsharded": Layout(2, {"runtime.shard_size": 1}),
    "2, ZeRO-2, accumulate 2": Layout(2, {"runtime.accumulate": 2}),
    "2, bf16, statistics by rows": Layout(2, {"model.precision": "bf16", "loss.projector": (64, 64)}),
    "2, context_target": Layout(2, {"loss.vicreg_views": "context_target", "loss.projector": (12, 12, 12)}),
    "4, ZeRO-2": Layout(4),
    "4, ZeRO-3, units of 1": Layout(4, plan=Plan(reshard=True, unit=1)),
    "4, ZeRO-2, units of 2": Layout(4, plan=Plan(unit=2)),
    "4, ZeRO-3, recomputed": Layout(4, plan=Plan(reshard=True, recompute=True)),
    "4, unsharded, accumulate 2": Layout(4, {"runtime.shard_size": 1, "runtime.accumulate": 2}),
    "4, hybrid of 2, ZeRO-2": Layout(4, {"runtime.shard_size": 2}),
    "4, hybrid of 2, ZeRO-3, accumulate 2": Layout(
        4, {"runtime.shard_size": 2, "runtime.accumulate": 2}, Plan(reshard=True)
    ),
    "4, hybrid of 2, no VICReg, accumulate 4": Layout(
        4, {"runtime.shard_size": 2, "runtime.accumulate": 4, "method": "ijepa"}
    ),
}  # fmt: skip


class Counter(TorchDispatchMode):
    """A count of collectives by kind and group, with their bytes as `operations.Operation` defines them."""

    KINDS = {  # noqa: RUF012  the operation, and the position of the argument that holds the bytes
        "_allgather_base_": ("all-gather", 0), "allgather_": ("all-gather", 0),
        "_reduce_scatter_base_": ("reduce-scatter", 1), "allreduce_": ("all-reduce", 0),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[Key] = collections.Counter()
        self.bytes: collections.Counter[Key] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            kind, holder = self.KINDS.get(name, (name, None))
            group = next((g for g in map(_group, args) if g is not None), None)
            ranks = [0] if group is None else dist.get_process_group_ranks(group)
            key = kind, len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1
            self.found[key] += 1
            self.bytes[key] += 0 if holder is None else sum(tensor.nbytes for tensor in _tensors(args[holder]))
        return func(*args, **(kwargs or {}))

    def counts(self) -> Counts:
        return {key: (number, self.bytes[key]) for key, number in self.found.items()}


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return dist.ProcessGroup.unbox(argument)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def configure(layout: Layout) -> Config:
    """Return a model of three blocks and two; not all of its parameters divide by the number of ranks."""
    c = config.replace(
        PRESETS["demo"],
        {
            "model.predictor_depth": 2, "loss.projector": (12, 12), "runtime.kernels": "eager",
            "optim.batch_size": _IMAGES * layout.processes, **layout.changes,
        },
    )  # fmt: skip
    config.validate(c)
    config.validate_world(c, layout.processes)
    return c


def count(layout: Layout, world: World) -> list[Counts]:
    """Count the collectives of this rank in each of `STEPS` steps of the main job."""
    c = configure(layout)
    training = Training(c, torch.device("cpu"), world=world, plan=layout.plan)
    images = torch.zeros(_IMAGES, c.model.image_size, c.model.image_size, 3, dtype=torch.uint8)
    ids = range(world.rank * _IMAGES, (world.rank + 1) * _IMAGES)
    found = []
    for step in range(STEPS):
        masks = training.draw(step, ids)
        with Counter() as counter:
            training.step(images, masks, 0.99)
        found.append(counter.counts())
    return found


def predict(layout: Layout) -> Counts:
    """Count the collectives of the model's step."""
    c, world = configure(layout), World(size=layout.processes, local_size=layout.processes)
    found: Counts = {}
    step = Step(c, world, plan=layout.plan, tokens=(11, 5), machine=Machine(), kernels="eager")
    for operation in step.operations():
        if operation.kind != "work":
            key = operation.kind, operation.size, operation.stride
            number, bytes = found.get(key, (0, 0))
            found[key] = number + 1, bytes + operation.bytes
    return found


def differences(found: Counts, predicted: Counts) -> list[str]:
    """Return a line for each kind and group whose number or bytes differ."""
    lines = []
    for key in sorted({*found, *predicted}):
        ours, theirs = predicted.get(key, (0, 0)), found.get(key, (0, 0))
        if ours != theirs:
            kind, size, stride = key
            lines.append(
                f"{kind} among {size} ranks{f' {stride} apart' if stride > 1 else ''}: the step does {theirs[0]} of "
                f"{theirs[1]:,} bytes, the model says {ours[0]} of {ours[1]:,} bytes"
            )
    return lines


def _worker(rank: int, size: int, folder: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    torch.save({name: count(LAYOUTS[name], world) for name in names}, f"{folder}/{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def check(size: int, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the differences of each layout of `size` processes, on any rank and in any step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (size, folder, names), nprocs=size)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
    found = {}
    for name in names:
        predicted = predict(LAYOUTS[name])
        steps = [counts for rank in ranks for counts in rank[name]]
        found[name] = list(dict.fromkeys(line for counts in steps for line in differences(counts, predicted)))
    return found


def main(sizes: Sequence[int]) -> int:
    """Check all layouts of these numbers of processes; return 1 if one differs, 2 for an unknown number."""
    good = True
    for size in sizes:
        names = [name for name, layout in LAYOUTS.items() if layout.processes == size]
        if not names:
            known = sorted({layout.processes for layout in LAYOUTS.values()})
            print(f"no layout has {size} processes; there are some of {', '.join(map(str, known))}", file=sys.stderr)
            return 2
        for name, wrong in check(size, names).items():
            total = predict(LAYOUTS[name])
            number, bytes = (sum(value[index] for value in total.values()) for index in (0, 1))
            print(f"{name}: {number} collectives of {bytes:,} bytes a step, {'DIFFERENT' if wrong else 'equal'}")
            for line in wrong:
                print(f"  {name}: {line}", file=sys.stderr)
            good &= not wrong
    return 0 if good else 1
