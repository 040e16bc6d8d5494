"""A timeline of a step's operations: the waits of work for collectives, and their name."""

from __future__ import annotations

from collections.abc import Iterator

from bench.scale.machine import Machine, collective_ms, spread
from bench.scale.operations import Operation

COMPUTE_BOUND = 0.05  # exposed communication below this share of a step leaves compute the bottleneck

ASSUMPTIONS = (
    "Forward: a unit's weights are gathered while the unit before it computes (FSDP2 is one unit ahead). The step "
    "waits for those of a network's root and first unit, as FSDP2 starts a network behind all earlier work.",
    "Backward: a unit's gradients are reduced while the unit before it computes. The step waits for them one unit "
    "later (FSDP2 keeps one such buffer), and for averages over copies of the state at its end.",
    "Batch statistics hide behind nothing.",
    "Collectives on one kind of link follow each other; NVLink and network work side by side.",
    "All-gather and reduce-scatter are rings that move (n-1)/n of the bytes. All-reduce moves twice that, or runs "
    "along a tree where that is faster. Across nodes a group uses the network cards of all its GPUs.",
    "Left out: the feed, launches by the host, copies in and out of FSDP2's buffers, and the slowdown of products "
    "beside a collective.",
)  # fmt: skip


def lay_out(operations: Iterator[Operation], machine: Machine) -> dict[str, float]:
    """Return the milliseconds of each phase of work, and of each wait of work for communication.

    Their sum is the step. A wait is named by the purpose of the collective and the link that it crosses.
    """
    found: dict[str, float] = {}
    now = started = 0.0  # end and start of the last work
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
    """Return "compute", or the longest wait once all waits take `COMPUTE_BOUND` of the step."""
    waits = {name: milliseconds for name, milliseconds in phases.items() if " over " in name}
    if sum(waits.values()) < COMPUTE_BOUND * sum(phases.values()):
        return "compute"
    return max(waits, key=lambda name: waits[name])
