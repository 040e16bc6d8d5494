"""Linear layers by oneDNN on a CPU, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import ops
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _linear
from oracle import assert_no_worse

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(function: Callable[..., Tensor], **keywords: object) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: function(x, weight, bias, **keywords)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    return F.gelu(F.linear(x, weight, bias)) if gelu else F.linear(x, weight, bias)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(5,), (3, 17), (1, 1), (2, 0, 4)], ids=str)
def test_no_worse_than_torch(shape: tuple[int, ...], bias: bool, gelu: bool) -> None:
    args = [rows(*shape, 48), rows(72, 48, seed=1), *([rows(72, seed=2)] if bias else [])]
    if 0 in shape:
        out = ops.linear(*args, gelu=gelu)
        assert out.shape == (*shape, 72)
        return
    assert_no_worse(call(ops.linear, gelu=gelu), call(plain, gelu=gelu), args, torch.float32)


def test_the_product_is_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes the output and the gradient of x; nothing for "eager" or in fp64."""
    calls: list[tuple[int, ...]] = []
    whole = _linear._product

    def counted(x: Tensor, weight: Tensor, *more: object) -> Tensor:
        calls.append(tuple(weight.shape))
        return whole(x, weight, *more)

    monkeypatch.setattr(_linear, "_product", counted)
    x, weight = rows(4, 8).requires_grad_(), rows(6, 8, seed=1).requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert calls == [(6, 8), (8, 6)]
    ops.linear(x, weight, impl="eager").sum().backward()
    ops.linear(x.double(), weight.double()).sum().backward()
    assert len(calls) == 2


def test_without_gradient_gelu_is_part_of_the_product() -> None:
    x, weight, bias = rows(9, 48) * 3, rows(72, 48, seed=1), rows(72, seed=2)
    out = ops.linear(x, weight, bias, gelu=True)
    torch.testing.assert_close(out, plain(x, weight, bias, gelu=True), rtol=1e-5, atol=1e-5)
    tanh = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert (out - tanh).abs().max() > 1e-4, "the exact GELU"
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight.clone().requires_grad_(), bias, gelu=True), out)


def test_strided_rows_and_parts_of_a_weight() -> None:
    wide, weight = rows(2, 9, 96), rows(144, 48, seed=1)
    x, part = wide[:, 3:, ::2], weight[48:96]
    assert not x.is_contiguous()
    torch.testing.assert_close(ops.linear(x, part), F.linear(x, part), rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, weight, bias = rows(4, 8), rows(6, 8, seed=1).requires_grad_(), rows(6, seed=2)
    ops.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None
    x, weight = x.requires_grad_(), weight.detach()
    ops.linear(x, weight, bias).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_second_derivatives_are_refused() -> None:
    x, weight = rows(4, 8).requires_grad_(), rows(6, 8, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_flop_are_counted() -> None:
    x, weight = rows(3, 5, 8).requires_grad_(), rows(6, 8, seed=1).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * 8 * 6


def test_compiles_into_one_graph() -> None:
    """Also with Inductor, which refuses oneDNN's operation for weights that Inductor has not packed."""
    x, weight, bias = rows(3, 5, 8).requires_grad_(), rows(6, 8, seed=1).requires_grad_(), rows(6, seed=2)
    compiled = torch.compile(lambda *args: ops.linear(*args, gelu=True), fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), ops.linear(x, weight, bias, gelu=True))
    wanted = torch.autograd.grad(ops.linear(x, weight, bias, gelu=True).sum(), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight, bias).sum(), (x, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(UserError, match="unknown impl 'cublas' for linear"):
        ops.linear(rows(1, 8), rows(6, 8), impl="cublas")
