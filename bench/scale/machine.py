"""GPUs and the links between them, and the time of a collective on them. All rates are assumed inputs."""

from __future__ import annotations

import math
from typing import NamedTuple


class Machine(NamedTuple):
    """One GPU and the links between GPUs; `ORIGINS` says where each default comes from."""

    tflop_s: float = 989.0
    fraction: float = 0.4
    memory_gb_s: float = 4800.0
    gpus_per_node: int = 8
    intra_gb_s: float = 450.0
    inter_gb_s: float = 50.0
    base_us: float = 8.0
    intra_us: float = 1.0
    inter_us: float = 5.0


ORIGINS = {
    "tflop_s": "peak of dense bf16 products, NVIDIA H200 data sheet",
    "fraction": "share of that peak in a step, assumed; CAPI's authors report 0.58 at 3 B parameters on A100",
    "memory_gb_s": "memory bandwidth, NVIDIA H200 data sheet",
    "gpus_per_node": "as in NVIDIA's HGX H200 with 8 GPUs",
    "intra_gb_s": "NVLink per GPU and direction, NVIDIA H200 data sheet: 900 GB/s in both",
    "inter_gb_s": "network per GPU and direction: one card of 400 Gb/s for each, as in NVIDIA's DGX H200",
    "base_us": "of a collective beside its hops, of the order of NCCL's own model (src/graph/tuning.cc)",
    "intra_us": "of a hop within a node, of the same order",
    "inter_us": "of a hop between nodes, of the same order",
}


def spread(size: int, stride: int, machine: Machine) -> tuple[int, int]:
    """Return the nodes that `size` ranks, `stride` apart, lie on, and how many of the ranks share a node."""
    together = min(size, max(1, machine.gpus_per_node // stride))
    return math.ceil(size / together), together


def collective_ms(kind: str, bytes: int, size: int, stride: int, machine: Machine) -> float:
    """Return milliseconds of one collective alone: the base, its hops, and its bytes over the slowest link."""
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
