"""The cost of a run before it starts: parameters, FLOP and memory, counted in one step without data.

The step of the run is taken on fake tensors, which have shapes but no values: torch's counter adds up the FLOP, and a
dispatch mode follows every allocation. So any method is counted, without formulas of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import distributed
from cjepa_fast.config import Config, World, memory_plan, replace, shard_size
from cjepa_fast.engine.graphs import MOST
from cjepa_fast.engine.schedules import Length
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.masks import Masks
from cjepa_fast.methods import Method, build_method
from cjepa_fast.methods.parts import activation_dtype
from cjepa_fast.networks.precision import hold_copies
from cjepa_fast.networks.vit import blocks

FSDP_BLOCKS = 4  # transformer blocks per FSDP unit: fewer collectives than with 1, less memory than a whole network
ROOM = 0.9  # share of a GPU's memory to plan with; CUDA, NCCL, workspaces and fragments need the rest
Tokens = tuple[float, float]  # mean patches of a context and of a target block


class Memory(NamedTuple):
    """Bytes on one process, without the allocator's slack, workspaces of libraries and the CUDA context.

    state: fp32 weights, Adam moments and averages, over the processes that share them, and the images in flight.
    gradients: fp32, over the same processes.
    copies: weights as the products read them: 16-bit copies, or what FSDP2 gathers.
    activations: most bytes of activations and temporary values at any moment.
    peak: most bytes of everything; gradients come while activations go, so not the sum.
    """

    state: float
    gradients: float
    copies: float
    activations: float
    peak: float


class Cost(NamedTuple):
    """The counted step of one process.

    gflop: GFLOP per image by network, forward and backward, as the step computes them.
    parameters: trained parameters by network; 0 for averages.
    """

    gflop: dict[str, float]
    parameters: dict[str, int]
    memory: Memory


class Plan(NamedTuple):
    """How a step saves memory, and why, for the log.

    reshard: free gathered weights after use (ZeRO-3). recompute: compute activations again in the backward pass.
    cost: None if nothing was counted.
    """

    reshard: bool
    recompute: bool
    cost: Cost | None
    reason: str


def count(c: Config, world: World, tokens: Tokens | None, *, reshard: bool = False, recompute: bool = False) -> Cost:
    """Count one step of one process. Contexts and targets have `tokens` on average; None: no masks."""
    plain = replace(c, {"runtime.kernels": "eager", "runtime.attention": "sdpa"})
    dtype = activation_dtype(c)
    images = c.optim.batch_size // world.size
    parts = c.runtime.accumulate
    taken = min(parts, 2)  # further micro-batches only add their outputs
    with torch.device("meta"):
        method = build_method(plain)
    with _silence(), FakeTensorMode():
        _materialise(method)
        if recompute:
            for block in blocks(method, trained=True):
                distributed.checkpoint_activations(block)
        copies: dict[Tensor, Tensor] = {}
        if dtype != torch.float32:  # of one process; FSDP2 gathers in bf16, so it casts nothing either
            copies = hold_copies(method, dtype, rounded_grads=parts == 1)
        batch = taken * images // parts
        side = c.model.image_size
        shape = (batch, side, side, 3) if method.views == 1 else (method.views, batch, side, side, 3)
        pictures = torch.zeros(shape, dtype=torch.uint8)
        masks = [_masks(c, tokens, batch // taken) for _ in range(taken)]
        # Two passes: the counter's module hooks keep tensors alive.
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flop:
            forward_backward(method, pictures, masks)
        method.zero_grad()
        live = _Live([*method.parameters(), *method.buffers(), *copies.values(), pictures])
        with live.gradients_of(method), live:
            out = forward_backward(method, pictures, masks)
        kept = sum(x.nbytes for x in (out.predictions, out.embeddings) if x is not None) / taken
    trained = {name: _trained(network) for name, network in method.named_children()}
    shards, size = shard_size(c, world), dtype.itemsize
    everything = sum(trained.values())
    averaged = sum(average.numel() for average in method.averages().values())
    state = (12 * everything + 4 * averaged) / shards + 3 * method.views * images * 3 * side**2
    weights = float(sum(copy.nbytes for copy in copies.values()))
    if world.size > 1:
        unit = max(_unit(network) for network in method.children())
        # FSDP2: gathered weights, the unit in flight, its gradients, and those twice in fp32 on their way out
        weights = size * (min(2 * unit, everything) if reshard else everything) + unit * (2 * size + 8)
    before = 4 * everything / shards if parts > 1 or c.runtime.cuda_graph == "on" else 0.0
    moments = [bytes + max(before, gradients / shards) for bytes, gradients in live.moments]
    peak = state + weights + max(moments) + (parts - taken) * kept
    if c.runtime.cuda_graph == "on":  # a pool for all graphs beside the warm-up steps' memory, and each graph's results
        peak += max(bytes for bytes, _ in live.moments) + MOST * kept
    memory = Memory(state, 4 * everything / shards, weights, max(bytes for bytes, _ in live.moments), peak)
    return Cost(_by_network(method, flop, batch), trained, memory)


def plan_memory(
    c: Config, world: World, tokens: Tokens | None, memory_gb: float | None, *, measure: bool
) -> Plan:  # fmt: skip
    """Decide how the step saves memory, see `runtime.memory`.

    "auto" takes the cheapest plan that fits: none; ZeRO-3, more communication; recomputation, more work; both.

    Args:
        memory_gb: memory of the device in 10^9 bytes; None: not limited.
        measure: count the step also where no memory limits the plan.
    """
    parsed = memory_plan(c.runtime.memory)
    assert parsed is not None, c.runtime.memory
    wanted, given = parsed
    memory_gb = given or memory_gb
    sharded = shard_size(c, world) > 1
    plans = {"keep": (False, False), "reshard": (sharded, False), "recompute": (False, True), "both": (sharded, True)}
    choices = list(dict.fromkeys(plans.values())) if wanted == "auto" else [plans[wanted]]
    limit = math.inf if memory_gb is None else ROOM * memory_gb * 1e9
    found: list[Cost] = []
    for reshard, recompute in choices if measure or memory_gb is not None else ():
        found.append(count(c, world, tokens, reshard=reshard, recompute=recompute))
        if found[-1].memory.peak <= limit:
            break
    peaks = [cost.memory.peak for cost in found]
    index = min(range(len(found)), key=lambda i: (peaks[i] > limit, peaks[i]), default=0)
    reshard, recompute = choices[index]
    reason = "activations recomputed" if recompute else "activations kept"
    if sharded:
        reason = f"{'ZeRO-3' if reshard else 'ZeRO-2'}, {reason}"
    if found:
        reason += f": about {peaks[index] / 1e9:.1f} GB a process"
    if found and memory_gb is not None:
        room = f"{ROOM:.0%} of {memory_gb:.0f} GB"
        if peaks[index] > limit:
            reason += f", more than {room}: raise runtime.accumulate if it runs out of memory"
        elif index == 0:
            reason += f", within {room}"
        else:
            reason += f", as {peaks[0] / 1e9:.1f} GB would exceed {room}"
    return Plan(reshard, recompute, found[index] if found else None, reason)


def layout(c: Config, world: World) -> str:
    """Describe how the state lies over the processes, for people."""
    shards = shard_size(c, world)
    if world.size == 1:
        return "state whole on one process"
    why = " (auto)" if c.runtime.shard_size is None else ""
    copies = world.size // shards
    spread = f"state in {shards} shards" if shards > 1 else "state not sharded"
    return f"{spread}, {copies} {'copies' if copies > 1 else 'copy'}{why}"


def report(c: Config, world: World, steps: Length, plan: Plan, tokens: Tokens | None) -> str:
    """Return the tables of `--check`."""
    assert plan.cost is not None
    cost, memory = plan.cost, plan.cost.memory
    total = sum(cost.gflop.values())
    batch, patches = c.optim.batch_size, (c.model.image_size // c.model.patch_size) ** 2
    lines = [f"{'':16}{'parameters':>14}{'GFLOP/image':>14}{'share':>8}"]
    for name, number in cost.parameters.items():
        shown = f"{number:,}" if number else "average"
        lines.append(f"{name:16}{shown:>14}{cost.gflop[name]:>14.3f}{cost.gflop[name] / total:>8.1%}")
    lines.append(f"{'total':16}{sum(cost.parameters.values()):>14,}{total:>14.3f}{1:>8.1%}")
    lines += ["GFLOP: forward and backward, counted in one step without data", ""]
    if tokens is not None:
        lines.append(
            f"tokens   {patches} per image, {tokens[0]:.1f} in the context,"
            f" {c.mask.num_targets} x {tokens[1]:.1f} targets"
        )
    lines += [
        f"steps    {steps.total:,} of {batch} images ({world.size} x {batch // world.size}), {steps.per_epoch:,} per"
        f" epoch, {steps.total / steps.per_epoch:.4g} epochs, warm-up {steps.warmup:,}",
        f"work     {_flop(total * batch)} per step, {_flop(total * batch * steps.total)} in all",
        f"layout   {layout(c, world)}; {plan.reason}",
        f"memory   {_gb(memory.peak)} GB at the peak: state {_gb(memory.state)}, gradients {_gb(memory.gradients)},"
        f" copies {_gb(memory.copies)}, activations at most {_gb(memory.activations)}",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the implementations of the counted step out of the log, which names those of the run."""
    log = logging.getLogger("cjepa_fast")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Live(TorchDispatchMode):
    """Bytes of live storages that operations made, after each operation, and of gradients apart."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = [0]
        self.bytes = self.gradients = 0
        self.moments: list[tuple[int, int]] = [(0, 0)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._sizes:
                size = [storage.nbytes()]
                self._sizes[storage] = size
                self.bytes += size[0]
                weakref.finalize(storage, self._free, size)
        self.moments.append((self.bytes, self.gradients))
        return out

    def _free(self, size: list[int]) -> None:
        self.bytes -= size[0]

    @contextlib.contextmanager
    def gradients_of(self, network: nn.Module) -> Iterator[None]:
        """Count gradients of parameters apart, in fp32, once they are whole."""

        def move(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is not None and (size := self._sizes.get(grad.untyped_storage())) and size[0]:
                self.bytes -= size[0]
                self.gradients += 4 * parameter.numel()
                size[0] = 0

        handles = [p.register_post_accumulate_grad_hook(move) for p in network.parameters() if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _materialise(method: Method) -> None:
    """Replace meta parameters and buffers by (fake) ones on the CPU, where torch picks a fused attention."""
    for module in method.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _masks(c: Config, tokens: Tokens | None, images: int) -> Masks | None:
    if tokens is None:
        return None
    context, target = (max(1, round(number)) for number in tokens)
    return Masks(
        torch.zeros(images, context, dtype=torch.int16),
        torch.zeros(images, c.mask.num_targets, target, dtype=torch.int16),
    )


def _attention_flop(query: list[int], key: list[int], *args: Any, **kwargs: Any) -> int:
    """Count two products: 4 d FLOP per head and pair of query and key."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def _attention_backward_flop(grad: list[int], query: list[int], key: list[int], *args: Any, **kwargs: Any) -> int:
    """Count five products to the forward pass's two, as torch does for its GPU kernels."""
    return _attention_flop(query, key) * 5 // 2


# torch's counter has formulas for the attention kernels of GPUs alone.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


def _by_network(method: Method, flop: FlopCounterMode, images: int) -> dict[str, float]:
    """Return GFLOP per image of each child. A child that runs first outside of `forward` is known by its class."""
    counts = {name: sum(values.values()) for name, values in flop.get_flop_counts().items()}
    found = {}
    for name, network in method.named_children():
        own = counts.get(f"{type(method).__name__}.{name}") or counts.get(type(network).__name__, 0)
        found[name] = own / images / 1e9
    return found


def _trained(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _unit(network: nn.Module) -> int:
    """Return the parameters of one FSDP unit."""
    unit = itertools.islice(blocks(network), FSDP_BLOCKS)
    return sum(parameter.numel() for block in unit for parameter in block.parameters())


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f}"


def _flop(giga: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if giga < 1000:
            return f"{giga:.3g} {unit}"
        giga /= 1000
    return f"{giga:,.3g} EFLOP"
