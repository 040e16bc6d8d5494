"""The main job's training step, feed included, as every benchmark builds and takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cjepa_fast.config import Config, World
from cjepa_fast.engine import cost, graphs
from cjepa_fast.engine.build import FSDP_BLOCKS, build_learner, build_sampler
from cjepa_fast.engine.device import keep_freed_memory
from cjepa_fast.engine.step import Parts, StepOutput, forward_backward
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views
from cjepa_fast.masks import MultiBlockSampler
from cjepa_fast.methods import Method, build_method

__all__ = ["Plan", "Training", "build_method", "build_sampler", "keep_freed_memory", "open_feed"]


class Plan(NamedTuple):
    """Choices of memory against time: ZeRO-3 (`reshard`), recomputed activations, blocks per FSDP unit."""

    reshard: bool = False
    recompute: bool = False
    unit: int = FSDP_BLOCKS


def open_feed(c: Config, roots: Sequence[str], batch_size: int, device: torch.device, threads: int) -> Batches:
    """Open an endless stream of training batches from the images at `roots`, decoded by so many threads."""
    place = Place(device=str(device), threads=threads)
    return Batches(open_sources(list(roots)), c.data, Views(c.model.image_size), Order(c.seed, batch_size), place)


class Training:
    """The main job's learner on this process, ready to take steps.

    Attributes:
        device: of the networks.
        networks: the method, with its networks as children.
        sampler: the mask sampler.
        compiled: the choice that `runtime.compile` came to, in words.
    """

    def __init__(
        self, c: Config, device: torch.device, networks: Method | None = None, *, world: World | None = None,
        plan: Plan | None = None,
    ) -> None:  # fmt: skip
        if c.runtime.cuda_graph == "on":
            graphs.require(c.runtime.kernels, device)
        self.device, plan = device, plan or Plan()
        memory = cost.Plan(plan.reshard, plan.recompute, None, "")
        self._learner = build_learner(c, world or World(), device, memory, method=networks, unit=plan.unit)
        self.networks, self.compiled = self._learner.method, self._learner.compiled
        sampler = self._learner.masks.sampler
        assert sampler is not None, "the benchmarks train JEPAs"
        self.sampler: MultiBlockSampler = sampler

    def draw(self, step: int, ids: Sequence[int] | np.ndarray | Tensor) -> Parts:
        """Draw the masks of the images `ids` at `step`, for each micro-batch in turn, on the device."""
        return self._learner.masks(step, ids)

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Set the learning rate, and the weight decay of the parameters that are decayed."""
        for group in self._learner.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["decayed"] else 0.0

    def step(self, images: Tensor, masks: Parts, momentum: float) -> StepOutput:
        """Take a whole step: loss, gradients, optimizer, and EMA with `momentum`."""
        return self._learner.step(images, masks, momentum)

    def gradients(self, images: Tensor, masks: Parts) -> StepOutput:
        """Compute the loss and accumulate its gradients."""
        return forward_backward(self.networks, images, masks)

    def update(self, momentum: float) -> None:
        """Apply the gradients, move the averages with `momentum`, and drop the gradients."""
        self._learner.optimizer.step(momentum=momentum)
        self._learner.optimizer.zero_grad()
