"""AdamW with averages in one pass: the kernel (interpreted in fp32 without a GPU), its tables, its choice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from cjepa_fast import ops, reference
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _adamw_ema as door
from cjepa_fast.ops import _choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# two whole chunks; a whole and a partial one; a partial one of several dimensions; a scalar; an empty shard
SHAPES = [(2, 1024), (1029,), (3, 5, 7), (), (0, 4)]
GROUPS = [0, 1, 0, 1, 0]
BETAS, EPS = (0.9, 0.999), 1e-8
TENSORS = ("parameters", "exp_avgs", "exp_avg_sqs", "averages")


class State(NamedTuple):
    """The tensors that a step changes; the parameter of three dimensions has no average."""

    parameters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor | None]
    steps: list[Tensor]


def place(value: Tensor, offset: int = 0) -> Tensor:
    """Return a copy on the device, `offset` elements after an aligned address, between sevens."""
    storage = torch.full((offset + value.numel() + 4,), 7.0, dtype=value.dtype, device=DEVICE)
    inner = storage[offset : offset + value.numel()]
    inner.copy_(value.flatten())
    return inner.view(value.shape)


def start(shapes: Sequence[tuple[int, ...]] = SHAPES, offset: int = 0) -> State:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in shapes]
    averages = [None if len(shape) == 3 else place(torch.randn(shape, generator=generator), offset) for shape in shapes]
    moments = [[place(torch.zeros(shape), offset) for shape in shapes] for _ in range(2)]
    steps = [torch.zeros((), device=DEVICE) for _ in shapes]
    return State([place(p, offset) for p in parameters], *moments, averages, steps)


def gradients(step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Return gradients of every size from 1e-6 to 1e2; some elements never have one, so that eps decides."""
    generator = torch.Generator().manual_seed(1000 + step)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    sizes = [10.0 ** (torch.arange(grad.numel()) % 9 - 6).view(grad.shape) for grad in grads]
    return [
        place(torch.where(size > 50, 0.0, size) * grad) for size, grad in zip(sizes, grads, strict=True)
    ]  # fmt: skip


def hyperparameters(lr: float, weight_decay: float, momentum: float = 0.996) -> Tensor:
    rows = [[lr, decay, *BETAS, EPS, momentum] for decay in (weight_decay, 0.0)]
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)


def take(state: State, grads: list[Tensor], hyper: Tensor, impl: str = "triton", **copies: Any) -> None:
    groups = GROUPS[: len(state.parameters)]
    ops.adamw_ema(
        state.parameters, grads, state.exp_avgs, state.exp_avg_sqs, state.steps, hyper, groups,
        averages=state.averages, impl=impl, **copies,
    )  # fmt: skip


def plan(step: int) -> tuple[float, float, float]:
    """Return changing learning rates, weight decays and momenta."""
    return 1e-3 * (1 + step % 7), 0.04 + 0.003 * step, 0.99 + 1e-4 * (step % 90)


def same(a: State, b: State) -> bool:
    pairs = ((x, y) for ours, theirs in zip(a, b, strict=True) for x, y in zip(ours, theirs, strict=True))
    return all(x is y or torch.equal(x, y) for x, y in pairs)


def worst(state: State, truth: dict[str, list[Any]], name: str) -> tuple[float, float]:
    """Return a column's largest error, relative to each tensor's largest true value, and that of one fp32 rounding."""
    errors = [
        ((tensor.double() - true).abs().max() / true.abs().max()).item()
        for tensor, true in zip(getattr(state, name), truth[name], strict=True)
        if true is not None and true.numel()
    ]
    return max(errors), torch.finfo(torch.float32).eps


def test_a_hundred_steps_are_no_worse_than_torch() -> None:
    """Against fp64, with torch's fused and foreach optimizers as yardsticks, under changing hyperparameters."""
    shapes, steps = [*SHAPES[1:3], ()], 110
    ours, grads = start(shapes), [gradients(step, shapes) for step in range(steps)]
    yardsticks = {kind: start(shapes) for kind in ("fused", "foreach")}
    optimizers = {}
    for kind, state in yardsticks.items():
        groups = [
            {"params": [p for p, group in zip(state.parameters, GROUPS, strict=False) if group == g]} for g in (0, 1)
        ]
        optimizers[kind] = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, **{kind: True})
    truth: dict[str, list[Any]] = {
        name: [None if t is None else t.double() for t in getattr(ours, name)] for name in TENSORS
    }  # fmt: skip

    for step in range(steps):
        lr, weight_decay, momentum = plan(step)
        take(ours, grads[step], hyperparameters(lr, weight_decay, momentum))
        for kind, optimizer in optimizers.items():
            state = yardsticks[kind]
            for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
                group["lr"], group["weight_decay"] = lr, decay
            for parameter, grad in zip(state.parameters, grads[step], strict=True):
                parameter.grad = grad
            optimizer.step()
            followed = [(a, p) for a, p in zip(state.averages, state.parameters, strict=True) if a is not None]
            torch._foreach_lerp_(*map(list, zip(*followed, strict=True)), 1 - momentum)
        for index, grad in enumerate(grads[step]):
            truth["parameters"][index], (truth["exp_avgs"][index], truth["exp_avg_sqs"][index]) = reference.adamw(
                truth["parameters"][index], grad.double(),
                (truth["exp_avgs"][index], truth["exp_avg_sqs"][index]), step + 1, lr=lr,
                weight_decay=(weight_decay, 0.0)[GROUPS[index]], betas=BETAS, eps=EPS,
            )  # fmt: skip
            if truth["averages"][index] is not None:
                truth["averages"][index] = reference.ema(
                    truth["averages"][index], truth["parameters"][index], momentum
                )  # fmt: skip

    for kind, state in yardsticks.items():
        for slot, key in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            state[slot][:] = [optimizers[kind].state[p][key] for p in state.parameters]
        for name in TENSORS:
            (error, floor), (allowed, _) = worst(ours, truth, name), worst(state, truth, name)
            assert error <= 2 * allowed + 2 * floor, f"{name}: error {error:.3g}, torch's {kind} {allowed:.3g}"
    assert all(step == steps for step in ours.steps)


def test_second_moment_is_more_exact_than_torchs() -> None:
    """1 - beta2 keeps its digits: over many equal gradients v tends to g^2, not to 1.00001 g^2."""
    state = start([(8,)])
    grad = [place(torch.full((8,), 3.0))]
    state.exp_avg_sqs[0].fill_(9.0)
    for _ in range(20):
        take(state, grad, hyperparameters(1e-3, 0.0))
    assert torch.equal(state.exp_avg_sqs[0].cpu(), torch.full((8,), 9.0))


@pytest.mark.parametrize("before", [0, 1, 9, 999, 999_999])
def test_bias_correction_is_exact_at_any_step(before: int) -> None:
    """With the moments after `before` steps of gradient 1, the update is lr / (1 + eps) at any step."""
    state, (beta1, beta2) = start([(4,)]), BETAS
    state.parameters[0].zero_()
    state.steps[0].fill_(before)
    state.exp_avgs[0].fill_(1 - beta1**before)
    state.exp_avg_sqs[0].fill_(1 - beta2**before)
    take(state, [place(torch.ones(4))], hyperparameters(1e-3, 0.1))
    assert state.steps[0] == before + 1
    expected = torch.full((4,), -1e-3)
    torch.testing.assert_close(state.parameters[0].cpu(), expected, rtol=3 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("momentum", [0.996, 0.9999997, 0.5, 0.3])
def test_averages_are_lerps(momentum: float) -> None:
    """Compiled: the bits of torch.lerp. Interpreted: one ulp of the larger end, as a multiply-add rounds twice."""
    state = start()
    before = [None if a is None else a.clone() for a in state.averages]
    take(state, gradients(0), hyperparameters(1e-3, 0.1, momentum))
    for old, new, parameter in zip(before, state.averages, state.parameters, strict=True):
        if old is None or new is None:
            continue
        expected = torch._foreach_lerp([old], [parameter], 1 - momentum)[0]
        ulp = torch.finfo(torch.float32).eps * torch.maximum(old.abs(), parameter.abs())
        assert ((new - expected).abs() <= (0 if DEVICE == "cuda" else 1) * ulp).all()
        assert not new.numel() or momentum > 0.9999 or not torch.equal(new, old)


@pytest.mark.parametrize("momentum", [0.996, 0.9999997])
def test_one_minus_momentum_keeps_its_digits(momentum: float) -> None:
    """Exactly: an average of zero becomes (1 - momentum) * parameter, with the weight rounded once from fp64."""
    state = start([(1029,)])
    average = state.averages[0]
    assert average is not None
    average.zero_()
    take(state, gradients(0, [(1029,)]), hyperparameters(1e-3, 0.1, momentum))
    assert torch.equal(average, state.parameters[0] * torch.tensor(1 - momentum, dtype=torch.float32, device=DEVICE))


def test_averages_at_the_ends() -> None:
    """Exactly: momentum 0 copies the parameter, 1 keeps the average, an equal average stays equal."""
    state = start()
    take(state, gradients(0), hyperparameters(1e-3, 0.1, momentum=0.0))
    assert all(a is None or torch.equal(a, p) for a, p in zip(state.averages, state.parameters, strict=True))
    kept = [None if a is None else a.clone() for a in state.averages]
    take(state, gradients(1), hyperparameters(0.0, 0.1, momentum=0.7))
    assert all(a is None or torch.equal(a, b) for a, b in zip(state.averages, kept, strict=True))
    take(state, gradients(2), hyperparameters(1e-3, 0.1, momentum=1.0))
    assert all(a is None or torch.equal(a, b) for a, b in zip(state.averages, kept, strict=True))
    assert not torch.equal(state.parameters[0], kept[0])


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_unaligned_tensors_agree_bitwise(offset: int) -> None:
    """As in FSDP2's shards and gradients; neighbouring memory stays."""
    aligned, shifted = start(), start(offset=offset)
    for step in range(2):
        take(aligned, gradients(step), hyperparameters(1e-3, 0.1))
        grads = [place(grad.cpu(), offset) for grad in gradients(step)]
        take(shifted, grads, hyperparameters(1e-3, 0.1))
    assert same(aligned, shifted)
    written = [*shifted.parameters, *shifted.exp_avgs, *shifted.exp_avg_sqs, *shifted.averages]
    for tensor in (tensor for tensor in written if tensor is not None):
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert (storage[:offset] == 7).all() and (storage[offset + tensor.numel() :] == 7).all()


def test_one_unaligned_gradient_among_aligned_tensors() -> None:
    aligned, mixed = start(), start()
    take(aligned, gradients(0), hyperparameters(1e-3, 0.1))
    take(mixed, [place(grad.cpu(), index % 2) for index, grad in enumerate(gradients(0))], hyperparameters(1e-3, 0.1))
    assert same(aligned, mixed)


def test_twice_gives_the_same_bits() -> None:
    first, second = start(), start()
    for state in (first, second):
        for step in range(2):
            take(state, gradients(step), hyperparameters(*plan(step)))
    assert same(first, second)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # beta 0: the logarithm's infinity is right
def test_every_tensor_has_its_own_hyperparameters() -> None:
    """Three groups with different hyperparameters, against one call each."""
    rows = torch.tensor(
        [[1e-3, 0.1, 0.9, 0.999, 1e-8, 0.9], [2e-2, 0.0, 0.8, 0.95, 1e-3, 0.5], [0.0, 0.3, 0.0, 0.5, 1e-6, 0.1]],
        dtype=torch.float64, device=DEVICE,
    )  # fmt: skip
    shapes = [(1029,), (33,), (5,), (7,)]
    groups = [2, 0, 1, 0]
    together, apart = start(shapes), start(shapes)
    for step in range(2):
        grads = gradients(step, shapes)
        columns = (together.parameters, grads, together.exp_avgs, together.exp_avg_sqs, together.steps)
        ops.adamw_ema(*columns, rows, groups, averages=together.averages, impl="triton")
        for index, group in enumerate(groups):
            columns = (apart.parameters, grads, apart.exp_avgs, apart.exp_avg_sqs, apart.steps)
            one = [[column[index]] for column in columns]
            ops.adamw_ema(*one, rows[group : group + 1], [0], averages=[apart.averages[index]], impl="triton")
    assert same(together, apart)


def test_more_tensors_than_lanes() -> None:
    shapes = [(1 + index % 3,) for index in range(300)]
    state, eager = start(shapes), start(shapes)
    grads = gradients(0, shapes)
    for each, impl in ((state, "triton"), (eager, "eager")):
        columns = (each.parameters, grads, each.exp_avgs, each.exp_avg_sqs, each.steps)
        ops.adamw_ema(*columns, hyperparameters(1e-3, 0.1), [index % 2 for index in range(300)], impl=impl)
    assert all(step == 1 for step in state.steps)
    torch.testing.assert_close(state.parameters, eager.parameters, rtol=1e-6, atol=1e-7)


def test_bf16_gradients() -> None:
    """Alone and beside fp32 ones, they give the result of their values in fp32."""
    expected, alone, mixed = start(), start(), start()
    rounded = [grad.bfloat16() for grad in gradients(0)]
    take(expected, [grad.float() for grad in rounded], hyperparameters(1e-3, 0.1))
    take(alone, rounded, hyperparameters(1e-3, 0.1))
    take(mixed, [g if i % 2 else g.float() for i, g in enumerate(rounded)], hyperparameters(1e-3, 0.1))
    assert same(expected, alone) and same(expected, mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_copies(dtype: torch.dtype, exact: bool) -> None:
    """To the nearest on a GPU. The interpreter truncates, so without a GPU only the destinations are tested."""
    state = start()
    copies, average_copies = (
        [None if t is None or i == skip else torch.full_like(t, 7, dtype=dtype) for i, t in enumerate(column)]
        for skip, column in ((1, state.parameters), (0, state.averages))
    )  # fmt: skip
    take(state, gradients(0), hyperparameters(1e-3, 0.1), copies=copies, average_copies=average_copies)
    for column, sources in ((copies, state.parameters), (average_copies, state.averages)):
        assert sum(copy is not None for copy in column) >= 3
        for copy, source in zip(column, sources, strict=True):
            if copy is not None and source is not None:
                ulp = 0.0 if exact else torch.finfo(dtype).eps
                assert (
                    (copy.float() - source.to(dtype).float()).abs() <= ulp * source.abs() + 1e-7 * (not exact)
                ).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # from the interpreter; meant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite_reach_the_parameter(value: float) -> None:
    """NaN reaches the same elements as in torch's fused optimizer, and stays."""
    state, theirs = start(), start()
    optimizer = torch.optim.AdamW(theirs.parameters, fused=True)
    for step in range(2):
        grads = gradients(step)
        if step == 0:
            grads[0][1, 3] = grads[1][1027] = grads[3][...] = value
        for parameter, grad in zip(theirs.parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        take(state, grads, hyperparameters(1e-3, 0.1))
        for ours, parameter, average in zip(state.parameters, theirs.parameters, state.averages, strict=True):
            assert torch.equal(ours.isnan(), parameter.isnan())
            assert average is None or torch.equal(average.isnan(), parameter.isnan())
        assert sum(p.isnan().sum().item() for p in state.parameters) == 3


def test_gradients_may_move() -> None:
    """Gradients in fresh memory give the same bits; a step does not read the last step's memory."""
    kept, moving = start(), start()
    buffers = gradients(0)
    old: list[Tensor] = []
    for step in range(3):
        for buffer, grad in zip(buffers, gradients(step), strict=True):
            buffer.copy_(grad)
        take(kept, buffers, hyperparameters(1e-3, 0.1))
        fresh = [grad.clone() for grad in gradients(step)]
        take(moving, fresh, hyperparameters(1e-3, 0.1))
        old += fresh
        for grad in old:
            grad.fill_(float("nan"))
    assert same(kept, moving)


def test_tables_are_made_again_only_for_new_addresses() -> None:
    from cjepa_fast.kernels import adamw_ema as kernel

    state, grads, hyper = start(), gradients(0), hyperparameters(1e-3, 0.1)
    take(state, grads, hyper)
    made, chunked = kernel._table.cache_info().misses, kernel._chunks.cache_info().misses
    for _ in range(3):
        take(state, grads, hyper)
    assert kernel._table.cache_info().misses == made
    moved = [grad.clone() for grad in grads]
    take(state, moved, hyper)
    assert kernel._table.cache_info().misses == made + 1 and kernel._chunks.cache_info().misses == chunked


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize(("average", "copies"), [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_traffic(average: bool, copies: int, grad_type: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step touches every byte once, as `bytes_per_parameter` says; aligned and not."""
    from triton.runtime.interpreter import InterpreterBuilder

    from cjepa_fast.kernels import adamw_ema as kernel

    shapes = [(1024,), (77,)]
    state = start(shapes)
    averages = state.averages if average else []
    low = [[torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes] if copies > n else [] for n in (0, 1)]
    grads = [grad.to(grad_type) for grad in gradients(0, shapes)]
    tracked = [*state.parameters, *grads, *state.exp_avgs, *state.exp_avg_sqs, *averages, *low[0], *low[1]]
    moved = 0

    def count(method: str, position: int) -> None:
        original = getattr(InterpreterBuilder, method)

        def counting(self: Any, ptrs: Any, *args: Any) -> Any:
            nonlocal moved
            where = ptrs.data[np.broadcast_to(args[position].data != 0, ptrs.data.shape)]
            for tensor in tracked:
                first = tensor.data_ptr()
                moved += int(((where >= first) & (where < first + tensor.nbytes)).sum()) * tensor.itemsize
            return original(self, ptrs, *args)

        monkeypatch.setattr(InterpreterBuilder, method, counting)

    count("create_masked_load", 0)
    count("create_masked_store", 1)
    columns = (state.parameters, grads, state.exp_avgs, state.exp_avg_sqs, state.steps)
    ops.adamw_ema(
        *columns, hyperparameters(1e-3, 0.1), [0, 1], averages=averages, copies=low[0], average_copies=low[1],
        impl="triton",
    )  # fmt: skip
    assert moved == (1024 + 77) * kernel.bytes_per_parameter(grad_type, average=average, copies=copies)


def test_no_parameters_and_no_elements() -> None:
    ops.adamw_ema([], [], [], [], [], hyperparameters(1e-3, 0.1), [], impl="triton")
    state = start([(0, 4), (0,)])
    take(state, gradients(0, [(0, 4), (0,)]), hyperparameters(1e-3, 0.1))
    assert [step.item() for step in state.steps] == [1, 1]


def test_eager_is_the_reference() -> None:
    """In fp64, which the kernel refuses."""
    state = State(*([None if t is None else t.double() for t in column] for column in start()[:4]), start().steps)
    before, averages = ([None if t is None else t.clone() for t in column] for column in (state[0], state[3]))
    grads = [grad.double() for grad in gradients(0)]
    copies = [torch.full_like(p, 7, dtype=torch.bfloat16) for p in state.parameters]
    average_copies = [copies[0].clone(), *[None] * 4]
    take(state, grads, hyperparameters(1e-3, 0.1), "auto", copies=copies, average_copies=average_copies)
    assert average_copies[0] is not None and state.averages[0] is not None
    assert all(map(torch.equal, copies, [p.bfloat16() for p in state.parameters]))
    assert torch.equal(average_copies[0], state.averages[0].bfloat16())
    for index, (old, grad) in enumerate(zip(before, grads, strict=True)):
        assert old is not None
        zero = torch.zeros_like(old)
        expected, moments = reference.adamw(
            old, grad, (zero, zero), 1, lr=1e-3, weight_decay=(0.1, 0.0)[GROUPS[index]], betas=BETAS, eps=EPS
        )
        actual = (state.parameters[index], state.exp_avgs[index], state.exp_avg_sqs[index])
        torch.testing.assert_close(actual, (expected, *moments), rtol=1e-14, atol=0)
        average, follower = averages[index], state.averages[index]
        if average is not None:
            torch.testing.assert_close(follower, reference.ema(average, expected, 0.996), rtol=1e-13, atol=1e-15)


def arguments(averages: bool, copies: bool) -> tuple[Any, ...]:
    state = start([(9,), (2, 3)])
    twins = [[a for a in state.averages if averages and a is not None]]
    twins += [[torch.zeros_like(p, dtype=torch.bfloat16) for p in state.parameters if copies] for _ in range(2)]
    lists = (state.parameters, gradients(0, [(9,), (2, 3)]), state.exp_avgs, state.exp_avg_sqs, *twins, state.steps)
    return (*lists, hyperparameters(1e-3, 0.1), [0, 1])


@pytest.mark.parametrize(("averages", "copies"), [(False, False), (True, False), (True, True)])
def test_registration(averages: bool, copies: bool) -> None:
    torch.library.opcheck(door._adamw_ema, arguments(averages, copies))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_compiled_whole_graph(impl: str) -> None:
    """The bits of the uncompiled function, without graph break; one tensor has no average."""
    expected, actual = start(), start()

    def step(state: State, grads: list[Tensor], hyper: Tensor) -> None:
        take(state, [grad * 1.5 for grad in grads], hyper, impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for each, run in ((expected, step), (actual, compiled)):
        for index in range(2):
            run(each, gradients(index), hyperparameters(*plan(index)))
    assert same(expected, actual)


def test_autograd_notices_the_change() -> None:
    """torch must report a change of a parameter that backward still needs."""
    parameter = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = parameter.square().sum()
    zeros = [torch.zeros(3, device=DEVICE) for _ in range(2)]
    ops.adamw_ema(
        [parameter], [zeros[0].clone()], zeros[:1], zeros[1:], [torch.zeros((), device=DEVICE)],
        hyperparameters(1e-3, 0.1), [0], impl="triton",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_do_not_match_are_refused() -> None:
    def refused(message: str, **changes: Callable[[list[Any]], Any]) -> None:
        for impl in ("triton", "eager"):
            state = start([(4, 6), (5,)])
            lists: dict[str, Any] = {
                "grads": gradients(0, [(4, 6), (5,)]), "copies": [p.bfloat16() for p in state.parameters],
                "average_copies": [], "hyperparameters": hyperparameters(1e-3, 0.1), "groups": [0, 1],
                **state._asdict(),
            }  # fmt: skip
            for name, change in changes.items():
                lists[name] = change(lists[name])
            with pytest.raises(ValueError, match=message):
                ops.adamw_ema(**lists, impl=impl)
            assert all(step == 0 for step in state.steps)

    refused(r"2 parameters, but 1 grads", grads=lambda g: g[1:])
    refused(r"2 parameters, but 1 averages", averages=lambda a: a[1:])
    refused(r"grads\[1\] must be \(5,\) .*, got \(6,\)", grads=lambda g: [g[0], torch.ones(6, device=DEVICE)])
    refused(r"grads\[0\] .*float32 or torch\.bfloat16 .*, got .*float16", grads=lambda g: [g[0].half(), g[1]])
    refused(r"exp_avgs\[0\] must be \(4, 6\) torch\.float32", exp_avgs=lambda m: [m[0].double(), m[1]])
    refused(r"exp_avg_sqs\[1\] is None", exp_avg_sqs=lambda v: [v[0], None])
    refused(r"averages\[0\] must be contiguous, got strides \(1, 4\)", averages=lambda a: [a[0].T.contiguous().T, a[1]])
    refused(r"copies\[1\] must be \(5,\) torch\.bfloat16 or torch\.float16", copies=lambda c: [c[0], c[1].float()])
    refused(r"copies must be of one type", copies=lambda c: [c[0], c[1].half()])
    refused(
        r"there is no average",
        averages=lambda a: [],
        average_copies=lambda _: [torch.zeros(4, 6).to(DEVICE).half(), None],
        copies=lambda c: [],
    )
    refused(r"steps\[0\] must be \(\) torch\.float32", steps=lambda s: [s[0].double(), s[1]])
    refused(
        r"hyperparameters must be \(groups, 6\) torch\.float64 .*, got \(2, 6\) torch\.float32",
        hyperparameters=Tensor.float,
    )
    refused(r"hyperparameters must be .*, got \(2, 5\)", hyperparameters=lambda h: h[:, 1:])
    refused(r"hyperparameters must be .* contiguous", hyperparameters=lambda h: h.T.contiguous().T)
    refused(r"groups must be 2 rows of 2 hyperparameters, got \[0, 2\]", groups=lambda _: [0, 2])
    refused(r"groups must be 2 rows", groups=lambda _: [0])


def test_impl_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state, grads, hyper = start(), gradients(0), hyperparameters(1e-3, 0.1)
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        take(state, grads, hyper, "cuda")
    with pytest.raises(UserError, match=r"cannot run adamw_ema: parameters of torch\.float64 are not fp32"):
        take(state._replace(parameters=[p.double() for p in state.parameters]), grads, hyper)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        take(state, grads, hyper)


def test_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        for _ in range(2):
            take(start(), gradients(0), hyperparameters(1e-3, 0.1), "auto")
    chosen = "triton" if DEVICE == "cuda" else "eager"
    assert caplog.messages == [f"adamw_ema: {chosen} (the tensors are on {DEVICE})"]


def compiled_apart(code: str) -> str:
    """Return the output of a process that compiles kernels, as this one may interpret them."""
    result = subprocess.run(
        [sys.executable, *code.split()] if code.startswith("-m") else [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_aligned_tensors_move_sixteen_bytes_at_a_time() -> None:
    """All nine fp32 accesses of the aligned path, none through shared memory, and a correctly rounded division."""
    printed = compiled_apart("""
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cjepa_fast.kernels.adamw_ema import AOT

(tile,) = (tile for tile in AOT if tile["name"] == "update grad fp32, copy bf16")
constants = dict(tile["constants"])
options = {"num_warps": constants.pop("num_warps")}
given = {**tile["signature"], **dict.fromkeys(constants, "constexpr")}
names = tile["kernel"].arg_names
source = ASTSource(tile["kernel"], {name: given[name].removesuffix(":16") for name in names}, constexprs=constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
for wanted in ("ld.global.v4.b32", "st.global.v4.b32", "st.global.v2.b32", ".shared.", "div.full", "sqrt.approx"):
    print(len(re.findall(re.escape(wanted), ptx)))
""")
    assert printed.split() == ["5", "4", "2", "0", "0", "0"]


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    state, hyper = start(), hyperparameters(1e-3, 0.1)
    grads = [gradients(step) for step in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grad in grads:  # the second call has new addresses
            take(state, grad, hyper)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A replayed step reads the current hyperparameters and gradients, and counts."""
    plain, graphed = start(), start()
    buffers, hyper = gradients(0), hyperparameters(*plan(0))
    take(plain, gradients(0), hyper)
    take(graphed, buffers, hyper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(graphed, buffers, hyper)
    for step in range(1, 4):
        for buffer, grad in zip(buffers, gradients(step), strict=True):
            buffer.copy_(grad)
        hyper.copy_(hyperparameters(*plan(step)))
        graph.replay()
        take(plain, gradients(step), hyperparameters(*plan(step)))
    assert same(plain, graphed)
    with pytest.raises(RuntimeError, match="a tensor has moved"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        take(graphed, [grad.clone() for grad in buffers], hyper)
