"""Process group, FSDP2 units, and collectives with exact gradients.

Every rank holds a loss L_r, and FSDP2 averages gradients over ranks, so the objective is mean_r L_r. A collective whose
backward sums the upstream gradients of all ranks is then exact for 1 and N processes alike.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


def connect(rank: int, size: int, device: torch.device) -> None:
    """Start the process group (NCCL on GPUs, gloo on CPUs) if there is more than one process."""
    if size == 1:
        return
    # torchrun keeps one store over restarts on a machine; a prefix per attempt hides stale addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=300)))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt{attempt}", store),
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )


def world_size() -> int:
    """Return the number of processes that take part in collectives."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, same_downstream: bool) -> Tensor:
        ctx.same_downstream = same_downstream
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        if ctx.same_downstream:
            return grad * dist.get_world_size(), None
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad, None


def sum_over_ranks(x: Tensor, *, same_downstream: bool = False) -> Tensor:
    """Sum `x` over ranks, differentiably: the backward pass sums the upstream gradients of all ranks.

    same_downstream: promise that every rank computes the same function of the sum, so that the upstream gradients
        are equal and their sum needs no collective.
    """
    return x if world_size() == 1 else _SumOverRanks.apply(x, same_downstream)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Average `x` over ranks, without gradient."""
    return sum_over_ranks(x) / world_size()


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Concatenate [n, ...] of every rank (equal shapes) along the first dimension, in rank order."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def least(value: float | None, device: torch.device) -> float | None:
    """Return the least `value` of any rank; None, which all ranks must share, stays None."""
    if world_size() == 1 or value is None:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return found.item()


def union_over_ranks(values: Collection[int]) -> frozenset[int]:
    """Return the union of the values of all ranks."""
    if world_size() == 1:
        return frozenset(values)
    parts: list[list[int]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, sorted(values))
    return frozenset(value for part in parts for value in part)


def mesh(device_type: str, shard_size: int) -> DeviceMesh | None:
    """Return the layout of state: `shard_size` consecutive ranks share one copy; None for one process.

    1-D (all share one copy), or 2-D (replicate, shard): gradients are then reduced among the ranks of a copy, and
    their shards averaged over the copies.
    """
    size = world_size()
    if size == 1:
        return None
    if shard_size == size:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def shard(
    network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh | None, *, unit: int, reshard: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Shard a network in place with FSDP2, `unit` transformer blocks at a time; do nothing without a mesh.

    Args:
        reshard: free gathered weights after each unit's forward pass (ZeRO-3). Without it they are kept until the
            backward pass (ZeRO-2), which saves gathering them again. The target encoder, which has no backward pass,
            must free them: gathered weights that outlive the EMA update would be stale in the next step.
        dtype: in which weights are gathered; gradients are reduced in fp32 at least.
    """
    if mesh is None:
        return
    # FSDP2 warns about in-place changes of outputs that are views; no caller changes an output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    precise = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=precise, cast_forward_inputs=False)
    for start in range(0, len(blocks), unit):
        fully_shard(list(blocks[start : start + unit]), mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def forget_forwards(network: nn.Module) -> None:
    """Clear FSDP2's notes on forward passes of a network without backward passes; they would grow for ever.

    FSDP2 notes every pass of every unit, and clears the notes in the backward pass. A note takes about 100 bytes.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            # torch 2.11 has one group a module, later releases a list
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in filter(None, groups):
                group._post_forward_indices.clear()
                group.comm_ctx.post_forward_order.clear()


def checkpoint_activations(block: nn.Module) -> None:
    """Make a block keep its input alone for backward, and recompute the rest; nothing random happens inside.

    Names in state dicts stay. Call this before `block.compile` and `shard`.
    """

    def recomputed(self: nn.Module, *args: Any) -> Any:
        return checkpoint(type(self).forward, self, *args, use_reentrant=False, preserve_rng_state=False)

    block.forward = MethodType(recomputed, block)
