"""The operations of one training step of one rank: work and collectives, in the order in which they are issued.

Parameters come from the networks themselves. The order is that of FSDP2 and of the batch statistics.
`bench.scale.check` compares number, group and bytes of all collectives with real steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.flop import gflop_per_image, projector_widths
from bench.scale.machine import Machine
from bench.training import Plan, build_method
from cjepa_fast import config
from cjepa_fast.config import Config, World
from cjepa_fast.methods import Method
from cjepa_fast.ops import variance_covariance_form


class Operation(NamedTuple):
    """Work of one GPU, or a collective among `size` ranks that lie `stride` apart.

    Attributes:
        kind: "work", "all-gather", "reduce-scatter" or "all-reduce".
        phase: the phase of work, or the purpose of a collective.
        milliseconds: of work.
        bytes: delivered by an all-gather, taken by a reduce-scatter, or summed by an all-reduce, on each rank.
        starts: the collective starts after all earlier work (else: with the last work).
    """

    kind: str
    phase: str
    milliseconds: float = 0.0
    bytes: int = 0
    size: int = 1
    stride: int = 1
    starts: bool = False


class Unit:
    """Parameters that FSDP2 gathers and reduces together. `gathered`: they are in full at this point of the step."""

    def __init__(self, parameters: Sequence[nn.Parameter], blocks: int, element_size: int) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.blocks, self.element_size, self.gathered = blocks, element_size, False

    def elements(self, shards: int) -> int:
        """Count elements, with each parameter's first dimension padded to a multiple of `shards`."""
        return sum(math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) for shape in self.shapes)


class Network:
    """The units of one network in forward order; `root` holds the parameters outside the blocks."""

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
        self.parameters = sum(unit.elements(1) for unit in (self.root, *self.units))


class Step:
    """A training step of one rank.

    Args:
        plan: the choices of memory against time.
        tokens: mean patches of a context and of a target block.
        kernels: "triton" or "eager", as their batch statistics differ in collectives.
    """

    def __init__(
        self, c: Config, world: World, *, plan: Plan, tokens: tuple[float, float], machine: Machine, kernels: str
    ) -> None:  # fmt: skip
        self.c, self.world, self.machine, self.kernels = c, world, machine, kernels
        self.shards = config.shard_size(c, world)
        self.images = c.optim.batch_size // world.size
        self.recompute = plan.recompute
        networks: Any = _networks(config.replace(c, {"optim.batch_size": 2, "runtime.kernels": "eager"}))
        size, unit, reshard = networks.encoder.dtype.itemsize, plan.unit, plan.reshard
        encoder, predictor, target = networks.encoder, networks.predictor, networks.target_encoder
        self.encoder = Network(encoder, list(encoder.blocks), unit, reshard=reshard, element_size=size)
        self.predictor = Network(predictor, list(predictor.predictor_blocks), unit, reshard=reshard, element_size=size)
        self.target = Network(target, list(target.blocks), unit, reshard=True, element_size=size)
        self.projector = None
        if networks.projector is not None:
            self.projector = Network(networks.projector, [], 1, reshard=False, element_size=4)
        self.flop = gflop_per_image(c, context_tokens=tokens[0], target_tokens=tokens[1])

    def operations(self) -> Iterator[Operation]:
        """Yield all operations in order."""
        parts = self.c.runtime.accumulate
        share = 1 / parts
        for _ in range(parts):
            yield from self._forward(self.target, "target", self.flop.target * share)
        if parts > 1 and self.projector is not None:
            # a first pass without gradient gives the means for the batch statistics
            for _ in range(parts):
                yield from self._student(share)
            yield from self._regularisation()
        for _ in range(parts):
            yield from self._student(share)
            if parts == 1 and self.projector is not None:
                yield from self._regularisation()
            yield from self._backward(self.predictor, self.flop.predictor * share)
            yield from self._backward(self.encoder, self.flop.context * share)
        # AdamW reads weight, two moments and gradient, and writes all but the gradient; EMA reads and writes an average
        trained = self.encoder.parameters + self.predictor.parameters
        trained += self.projector.parameters if self.projector is not None else 0
        moved = (28 * trained + 8 * self.encoder.parameters) / self.shards
        yield Operation("work", "optimizer", moved / self.machine.memory_gb_s / 1e6)

    def _student(self, share: float) -> Iterator[Operation]:
        yield from self._forward(self.encoder, "forward", self.flop.context / 3 * share)
        yield from self._forward(self.predictor, "forward", self.flop.predictor / 3 * share)

    def _regularisation(self) -> Iterator[Operation]:
        """Yield the projector and the VICReg terms, forward and backward."""
        assert self.projector is not None
        yield from self._forward(self.projector, "forward", self.flop.projector / 3)
        yield from self._statistics()
        yield from self._backward(self.projector, self.flop.projector)

    def _statistics(self) -> Iterator[Operation]:
        """Yield the collectives of `cjepa_fast.losses` and `cjepa_fast.ops.variance_covariance`."""
        ranks, loss = self.world.size, self.c.loss
        if ranks == 1 or self.projector is None:
            return
        *hidden, width = projector_widths(self.c)
        views = self.c.mask.num_targets if loss.vicreg_views == "target_blocks" else 1

        def summed(bytes: int, kind: str = "all-reduce") -> Operation:
            return Operation(kind, "batch statistics", bytes=bytes, size=ranks, starts=True)

        for inner in (*hidden, *reversed(hidden)):  # batch norm forward and, with equal bytes, backward
            yield summed(2 * 8 * inner)
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
        """Take two thirds of `gflop`, the FLOP of both passes; all of it where activations are recomputed."""
        backward = gflop * (1 if self.recompute and network is not self.projector else 2 / 3)
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
        """Reduce in fp32 over the ranks of a copy, then average the shards over the copies."""
        unit.gathered = False
        bytes, copies = 4 * unit.elements(self.shards), self.world.size // self.shards
        if self.shards > 1:
            yield Operation("reduce-scatter", "gradient reduction", bytes=bytes, size=self.shards)
        if copies > 1:
            yield Operation(
                "all-reduce", "gradient reduction", bytes=bytes // self.shards, size=copies, stride=self.shards
            )


def _triton_products(images: int, views: int, width: int) -> Iterator[int]:
    """Yield the bytes of each sum of the covariance's tiles, as the kernel's schedule cuts them."""
    from cjepa_fast.kernels import variance_covariance as kernel

    tile, tiles, _, group, _ = kernel._product_schedule(torch.float32, width, width, images, views)
    block = tile["BLOCK"]
    size = tiles * block**2 + math.ceil(width / block) * block
    for start in range(0, views, group):
        yield 4 * min(group, views - start) * size


@functools.lru_cache(maxsize=4)
def _networks(c: Config) -> Method:
    """Build the networks without their memory."""
    with torch.device("meta"):
        return build_method(c)
