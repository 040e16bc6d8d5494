"""The main job's training step, feed included, as every benchmark builds and takes it.

Only this file knows where the library keeps the parts of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cjepa_fast import distributed, train
from cjepa_fast.config import Config, World
from cjepa_fast.config import schema as config
from cjepa_fast.engine import graphs
from cjepa_fast.engine.step import Networks, StepOutput, forward_backward, train_step
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.index import open_sources
from cjepa_fast.masks import Masks, MultiBlockSampler

UNIT = 4  # transformer blocks that FSDP2 gathers together


class Plan(NamedTuple):
    """Choices of memory against time: blocks a unit of FSDP2, ZeRO-3 (`reshard`), activations recomputed."""

    reshard: bool = False
    recompute: bool = False
    unit: int = UNIT


def build_networks(c: Config) -> Networks:
    """Return the networks of a configuration on torch's current device, drawn from its global generator."""
    return train.build_networks(c)


def build_sampler(c: Config) -> MultiBlockSampler:
    """Return the mask sampler of a configuration."""
    return train.build_sampler(c)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as the main job does on a CPU."""
    train.keep_freed_memory()


def open_feed(c: Config, roots: Sequence[str], batch_size: int, device: torch.device, threads: int) -> Batches:
    """Open an endless stream of training batches from the images at `roots`, decoded by so many threads."""
    return Batches(
        open_sources(list(roots)), batch_size=batch_size, image_size=c.model.image_size, seed=c.seed,
        crop_scale=c.data.crop_scale, crop_ratio=c.data.crop_ratio, hflip=c.data.hflip, device=str(device),
        threads=threads, prefetch=2,
    )  # fmt: skip


class Training:
    """Networks, optimizer and mask sampler of a configuration, ready to take steps on this process.

    Attributes:
        networks: the trained networks and the target encoder.
        sampler: the mask sampler.
        compiled: the choice that `runtime.compile` came to, in words.
    """

    def __init__(
        self, c: Config, device: torch.device, networks: Networks | None = None, *, world: World | None = None,
        plan: Plan | None = None,
    ) -> None:  # fmt: skip
        world, plan = world or World(), plan or Plan()
        self.c, self.device, self.sampler = c, device, build_sampler(c)
        self.networks = networks or build_networks(c).to(device)
        if plan.recompute:
            for block in (*self.networks.encoder.blocks, *self.networks.predictor.predictor_blocks):
                distributed.checkpoint_activations(block)
        self.compiled = train.compile_blocks(self.networks, c.runtime.compile, device, c.mask.mode)
        mesh = distributed.mesh(device.type, config.shard_size(c, world))
        train.shard_networks(self.networks, mesh, unit=plan.unit, reshard=plan.reshard)
        self._optimizer = train.build_optimizer(c, self.networks, sharded=world.size > 1)
        self._weights = train.loss_weights(c)
        self._step = functools.partial(train_step, self.networks, self._optimizer, self._weights)
        if c.runtime.cuda_graph == "on":
            graphs.require(c.runtime.kernels, device)
            self._step = graphs.GraphedStep(self._step, self._optimizer, graphs.Recorder(device))

    def draw(self, step: int, ids: Sequence[int] | np.ndarray | Tensor) -> list[Masks]:
        """Draw the masks of the images `ids` at `step`, for each micro-batch in turn, and place them on the device."""
        parts = self.sampler.sample_parts(step, ids, self.c.runtime.accumulate, union=train.needs_unions(self.c))
        return [train.place_masks(part, self.c.runtime.compile, self.device) for part in parts]

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Set the learning rate, and the weight decay of the parameters that are decayed."""
        for group in self._optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["decayed"] else 0.0

    def step(self, images: Tensor, masks: Sequence[Masks], momentum: float) -> StepOutput:
        """Take a whole step: loss, gradients, optimizer, and EMA with `momentum`."""
        return self._step(images, masks, momentum)

    def gradients(self, images: Tensor, masks: Sequence[Masks]) -> StepOutput:
        """Compute the loss and accumulate its gradients."""
        return forward_backward(self.networks, images, masks, self._weights)

    def update(self, momentum: float) -> None:
        """Apply the gradients, move the averages with `momentum`, and drop the gradients."""
        self._optimizer.step(momentum=momentum)
        self._optimizer.zero_grad()
