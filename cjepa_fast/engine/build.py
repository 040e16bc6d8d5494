"""Assembly of what learns: a method on its device, compiled and sharded, with optimizer, masks and step."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cjepa_fast import distributed
from cjepa_fast.config import Config, World, shard_size
from cjepa_fast.engine import graphs, optim
from cjepa_fast.engine.cost import FSDP_BLOCKS, Plan
from cjepa_fast.engine.step import Parts, StepOutput, train_step
from cjepa_fast.errors import UserError
from cjepa_fast.masks import MODES, MultiBlockSampler
from cjepa_fast.methods import Method, build_method
from cjepa_fast.methods.parts import activation_dtype
from cjepa_fast.networks.precision import hold_copies
from cjepa_fast.networks.vit import blocks, is_trained


class Learner(NamedTuple):
    """A method ready to train.

    step: take a whole step from images, masks and EMA momentum.
    compiled: the choice of torch.compile and its reason, for the log.
    """

    method: Method
    optimizer: optim.AdamW
    masks: MaskFeed
    step: Callable[[Tensor, Parts, float], StepOutput]
    compiled: str

    def tidy(self) -> None:
        """Do between intervals what would stall a step: garbage collection, and a check of the CUDA mask sampler."""
        gc.collect(1)
        for network in self.method.children():
            if not is_trained(network):
                distributed.forget_forwards(network)
        self.masks.verify()


def build_learner(
    c: Config, world: World, device: torch.device, plan: Plan, *, method: Method | None = None, unit: int = FSDP_BLOCKS
) -> Learner:  # fmt: skip
    """Build the learner of a configuration, after the process group exists.

    Every process draws the same initial weights from `seed`; sharding then keeps the process's part.

    Args:
        method: the method of this configuration on the device, instead of a new one.
        unit: transformer blocks per FSDP unit.
    """
    if method is None:
        torch.manual_seed(c.seed)
        method = build_method(c).to(device)
    if plan.recompute:  # before compilation and sharding, which must both see the recomputation
        for block in blocks(method, trained=True):
            distributed.checkpoint_activations(block)
    compiled = compile_blocks(method, c.runtime.compile, device, c.mask.mode if method.masked else None)
    shard(method, distributed.mesh(device.type, shard_size(c, world)), reshard=plan.reshard, unit=unit)
    optimizer = build_optimizer(c, method, sharded=world.size > 1)
    step: Callable[..., StepOutput] = functools.partial(train_step, method, optimizer)
    if c.runtime.cuda_graph == "on":
        step = graphs.GraphedStep(step, optimizer, graphs.Recorder(device))
    return Learner(method, optimizer, MaskFeed(c, method, device), step, compiled)


def build_sampler(c: Config) -> MultiBlockSampler:
    """Build the mask sampler; raises UserError, with the key, for masks that do not fit the grid of patches."""
    try:
        return MultiBlockSampler(
            c.model.image_size // c.model.patch_size, **vars(c.mask), seed=c.seed, impl=c.runtime.masks
        )
    except UserError as error:  # begins with the sampler's argument, which is a key of `mask` unless listed here
        name, _, rest = str(error).partition(":")
        key = {"impl": "runtime.masks", "grid": "model.image_size", "seed": "seed"}.get(name, f"mask.{name}")
        raise UserError(f"{key}:{rest}") from None


class MaskFeed:
    """The masks of each step, on the device of the run; none for a method without masks."""

    def __init__(self, c: Config, method: Method, device: torch.device) -> None:
        self.sampler = build_sampler(c) if method.masked else None
        self._parts, self._device = c.runtime.accumulate, device
        self._unions, self._keep_shapes = not method.needs_all_targets, c.runtime.compile == "static"

    def __call__(
        self, step: int, ids: Sequence[int] | np.ndarray | Tensor, *, whole: bool = False
    ) -> Parts:  # fmt: skip
        """Return the masks of each micro-batch.

        Args:
            ids: int64 [B] on the CPU, the process's images.
            whole: the target encoder must compute every token, as health figures need.
        """
        if self.sampler is None:
            return [None] * self._parts
        union = self._unions and not whole
        parts = self.sampler.sample_parts(step, ids, self._parts, union=union)
        return [part.placed(self._device, keep_shapes=self._keep_shapes) for part in parts]

    def verify(self) -> None:
        """Raise RuntimeError if the CUDA sampler found no context for some image; waits for the GPU."""
        if self.sampler is not None:
            self.sampler.verify()


def build_optimizer(c: Config, method: Method, *, sharded: bool) -> optim.AdamW:
    """Build AdamW with the method's averages, for networks on the device of the run.

    One process keeps 16-bit copies of the weights, so that no step casts them; FSDP2 makes its own of `sharded` ones.
    """
    groups, copies = optim.parameter_groups(method), {}
    dtype = activation_dtype(c)
    if not sharded and dtype != torch.float32:
        fused = optim.fuses(c.runtime.kernels, groups[0]["params"][0].device)
        copies = hold_copies(method, dtype, rounded_grads=fused and c.runtime.accumulate == 1)
    return optim.AdamW(groups, lr=c.optim.lr, averages=method.averages(), copies=copies, impl=c.runtime.kernels)


def compile_blocks(method: Method, wanted: str, device: torch.device, mask_mode: str | None) -> str:
    """Apply torch.compile to every transformer block; return the choice and its reason.

    Equal blocks share one compilation, and FSDP2's hooks lie between blocks. Static: each shape gets a program, five
    for a size of the masks' blocks. Dynamic: a block has one program for all shapes, or a few.
    """
    if wanted == "off" or (wanted == "auto" and device.type == "cpu"):
        return "not compiled" + (" (auto: on a CPU compiling outlasts small runs)" if wanted == "auto" else "")
    reason = ""
    if wanted == "auto":
        wanted = "dynamic" if mask_mode is not None and MODES[mask_mode].lengths_vary else "static"
        reason = f" (auto: {mask_mode or 'no'} masks)"
    # Dynamo would leave further shapes uncompiled; packed masks of 28 x 28 patches make 237 of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for block in blocks(method):
        block.compile(dynamic=wanted == "dynamic")
    return f"compiled for {'all shapes at once' if wanted == 'dynamic' else 'each shape'}{reason}"


def shard(method: Method, mesh: DeviceMesh | None, *, reshard: bool, unit: int) -> None:
    """Shard every network of a method, see `distributed.shard`.

    Untrained networks always free gathered weights. Heads without blocks, small and used once, never do and are
    gathered in fp32.
    """
    for network in method.children():
        own = list(blocks(network))
        free = reshard and bool(own) if is_trained(network) else True
        dtype = getattr(method.judged, "dtype", torch.float32) if own else torch.float32
        distributed.shard(network, own, mesh, unit=unit, reshard=free, dtype=dtype)
