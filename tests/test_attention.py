"""Attention: the kernels (interpreted in fp32 without a GPU), and every back-end that runs here."""

from __future__ import annotations

import itertools
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cjepa_fast import ops, reference
from cjepa_fast.ops import _attention as door
from cjepa_fast.ops import _attention_choice as choice
from cjepa_fast.ops import _choice
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where hardware rounds, so only a GPU tests 16 bits.
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.float16, marks=pytest.mark.gpu),
]
# sequences, tokens, heads, head width: of the predictors of ViT-S, B, L and H; ragged; softmax in several passes; the
# widest heads, in a tile that is not full
SHAPES = [(2, 51, 2, 64), (1, 84, 2, 32), (1, 84, 2, 24), (1, 112, 1, 24), (2, 13, 1, 80), (1, 40, 1, 88),
          (1, 300, 1, 32), (1, 70, 1, 128)]  # fmt: skip
HEADS, DIM = 2, 24
WIDTH = HEADS * DIM


@pytest.fixture(params=["fp32", "16 bit"], autouse=False)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the interpreter, which computes in fp32, with the tiles of fp32 or those shipped for 16 bits."""
    kernel = pytest.importorskip("cjepa_fast.kernels.attention")
    if request.param == "16 bit":
        if DEVICE == "cuda":
            pytest.skip("on a GPU, tiles of 16 bits are tested in 16 bits")
        fwd, bwd = kernel._fwd_tile, kernel._bwd_tile
        monkeypatch.setattr(kernel, "_fwd_tile", lambda dim, queries, keys, _: fwd(dim, queries, keys, True))
        monkeypatch.setattr(kernel, "_bwd_tile", lambda dim, keys, _, structured: bwd(dim, keys, True, structured))
    yield


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def call(function: Callable[..., Tensor], heads: int = HEADS, **keywords: Any) -> Callable[..., Tensor]:
    """Return `function` as a function of qkv, or of keys and values and query."""

    def run(qkv: Tensor, query: Tensor | None = None) -> Tensor:
        return function(qkv, heads, query=query, **keywords)

    return run


def assert_right(
    args: Sequence[Tensor], dtype: torch.dtype = torch.float32, heads: int = HEADS, impl: str = "triton",
    max_length: int | None = None, max_query_length: int | None = None, **keywords: Any,
) -> None:  # fmt: skip
    """Ask the oracle about output and all gradients."""
    lengths = {"max_length": max_length, "max_query_length": max_query_length}
    fused = call(ops.attention, heads, impl=impl, **lengths, **keywords)
    assert_no_worse(fused, call(reference.packed_attention, heads, **keywords), args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_attention(shape: tuple[int, ...], dtype: torch.dtype, tiles: None) -> None:
    batch, tokens, heads, dim = shape
    assert_right([rows(batch, tokens, 3 * heads * dim)], dtype, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys", [(5, 40), (70, 13), (4, 17), (33, 129)])
def test_queries_from_elsewhere(queries: int, keys: int, dtype: torch.dtype, tiles: None) -> None:
    assert_right([rows(2, keys, 2 * WIDTH), rows(2, queries, WIDTH, seed=1)], dtype)


def test_one_token(tiles: None) -> None:
    """The output is the value; query and key get no gradient, up to the rounding of two equal sums of 24 products."""
    qkv = rows(3, 1, 3 * WIDTH).requires_grad_()
    out = ops.attention(qkv, HEADS, impl="triton")
    assert torch.equal(out, qkv[..., 2 * WIDTH :])
    upstream = rows(*out.shape, seed=1)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    torch.testing.assert_close(grad[..., 2 * WIDTH :], upstream, rtol=2e-6, atol=0)
    assert grad[..., : 2 * WIDTH].abs().max() < 5e-6


# an empty sequence; padding behind the last; the longest shorter than promised
PACKED = {"offsets": (0, 5, 5, 25, 31), "max_length": 21}
PACKED_QUERY = {"query_offsets": (0, 7, 10, 10, 22), "max_query_length": 12}


def packing(*parts: dict[str, Any]) -> dict[str, Any]:
    return {k: offsets(*v) if isinstance(v, tuple) else v for part in parts for k, v in part.items()}


ON_A_CPU = [] if DEVICE == "cuda" else ["sdpa"]  # there, the host knows the lengths of packed sequences


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "eager", *ON_A_CPU])
@pytest.mark.parametrize(
    "form, shapes",
    [
        ((PACKED,), [(40, 3 * WIDTH)]),
        ((PACKED,), [(31, 3 * WIDTH)]),
        ((PACKED, PACKED_QUERY), [(40, 2 * WIDTH), (30, WIDTH)]),
        ((PACKED_QUERY,), [(4, 9, 2 * WIDTH), (150, WIDTH)]),
        ((PACKED,), [(200, 2 * WIDTH), (4, 9, WIDTH)]),
    ],
    ids=["self", "no padding", "both", "queries", "keys"],
)
def test_packed_sequences(
    form: tuple[dict[str, Any], ...], shapes: list[tuple[int, ...]], impl: str, dtype: torch.dtype, tiles: None
) -> None:
    assert_right([rows(*shape, seed=i) for i, shape in enumerate(shapes)], dtype, impl=impl, **packing(*form))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_of_several_tiles(dtype: torch.dtype, tiles: None) -> None:
    starts = offsets(0, 140, 143, 213)
    assert_right([rows(220, 3 * 32)], dtype, heads=1, offsets=starts, max_length=150)


# context, M, Kt: usual; a context of two tiles and blocks of two; one block; no context
STRUCTURES = [(13, 3, 5), (68, 2, 35), (20, 1, 9), (0, 3, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context, blocks, length", STRUCTURES)
def test_target_blocks(context: int, blocks: int, length: int, dtype: torch.dtype, tiles: None) -> None:
    batch = 1 if context > 50 else 2
    assert_right([rows(batch, context + blocks * length, 3 * 32)], dtype, heads=1, target_blocks=(blocks, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "eager", *ON_A_CPU])
def test_packed_target_blocks(impl: str, dtype: torch.dtype, tiles: None) -> None:
    """Contexts of 0, 7 and 20 tokens and an empty sequence, promised to be at most 24."""
    starts = offsets(0, 15, 37, 37, 72)
    keywords = {"offsets": starts, "max_length": 39, "target_blocks": (3, 5)}
    assert_right([rows(80, 3 * 32)], dtype, heads=1, impl=impl, **keywords)


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["self", "query", "structured", "no context"])
def test_back_ends_of_fixed_lengths(impl: str, form: str) -> None:
    args = [rows(2, 28, (2 if form == "query" else 3) * WIDTH)] + [rows(2, 5, WIDTH, seed=1)] * (form == "query")
    keywords = {"structured": {"target_blocks": (3, 5)}, "no context": {"target_blocks": (4, 7)}}.get(form, {})
    assert_right(args, impl=impl, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["sdpa", "xformers"])
def test_back_ends_of_a_gpu(impl: str, dtype: torch.dtype) -> None:
    if impl == "xformers":
        pytest.importorskip("xformers")
    assert_right([rows(2, 51, 3 * 128)], dtype, impl=impl)
    assert_right([rows(2, 51, 2 * 128), rows(2, 9, 128, seed=1)], dtype, impl=impl)
    assert_right([rows(2, 28, 3 * 128)], dtype, impl=impl, target_blocks=(3, 5))
    if impl != "sdpa":
        assert_right([rows(40, 3 * 128)], dtype, impl=impl, **packing(PACKED))


def loop(q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int]) -> Tensor:
    """Attend [T, heads, d], one sequence after another; NaN in the padding."""
    out = []
    for (a, b), (c, d) in zip(itertools.pairwise(q_starts), itertools.pairwise(k_starts), strict=True):
        sequence = reference.attention(*(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])))
        out.append(sequence.transpose(0, 1))
    return torch.cat([*out, torch.full_like(q[q_starts[-1] :], torch.nan)])


@pytest.mark.skipif(DEVICE == "cuda", reason="the real one runs")
@pytest.mark.parametrize("form", ["fixed", "packed", "query", "structured"])
def test_xformers_is_called_rightly(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in, as xformers does not run here: shapes, lengths, padding."""

    def memory_efficient_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: tuple[list[int], list[int]] | None = None
    ) -> Tensor:
        if attn_bias is None:
            return reference.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        starts = [[0, *itertools.accumulate(lengths)] for lengths in attn_bias]
        assert (q.shape[:2], k.shape[:2]) == ((1, starts[0][-1]), (1, starts[1][-1]))
        return loop(q[0], k[0], v[0], *starts)[None]

    mask = types.SimpleNamespace(from_seqlens=lambda queries, keys: (queries, keys))
    modules = {
        "xformers": {}, "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {}, "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": mask},
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(door, "choose_attention", lambda chosen, *_: chosen)
    if form == "packed":
        assert_right([rows(40, 3 * WIDTH)], impl="xformers", **packing(PACKED))
    elif form == "query":
        assert_right([rows(4, 9, 2 * WIDTH), rows(30, WIDTH, seed=1)], impl="xformers", **packing(PACKED_QUERY))
    else:
        keywords = {"target_blocks": (3, 5)} if form == "structured" else {}
        assert_right([rows(2, 28, 3 * WIDTH)], impl="xformers", **keywords)


def test_strided_inputs_agree_bitwise() -> None:
    """As a view into a wider tensor, as transposed memory, and with an upstream gradient of stride zero."""
    qkv, query = rows(2, 20, 2 * WIDTH), rows(2, 9, WIDTH, seed=1)

    def run(qkv: Tensor, query: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (qkv, query)]
        out = ops.attention(leaves[0], HEADS, query=leaves[1], impl="triton")
        assert out.is_contiguous()
        upstream = torch.tensor(0.3, device=DEVICE).expand(out.shape)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    def wide(x: Tensor) -> Tensor:
        return F.pad(x, (16, 32, 3, 2), value=torch.nan)[:, 3:-2, 16:-32]

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    expected = run(qkv, query)
    for stride in (wide, transposed):
        assert not stride(qkv).is_contiguous()
        for ours, theirs in zip(run(stride(qkv), stride(query)), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_large_logits(tiles: None) -> None:
    """Up to +-600. The yardstick is torch's fused kernel: recomputing the weights in backward costs digits, in any
    fused kernel."""
    qkv = rows(1, 70, 3 * 32)
    qkv[..., :64] *= 12
    assert_no_worse(call(ops.attention, 1, impl="triton"), call(ops.attention, 1, impl="sdpa"), [qkv], torch.float32)


@pytest.mark.parametrize("tokens", [13, 150])
def test_logits_far_below_zero(tokens: int, tiles: None) -> None:
    """Near -570, where a masked key would win with a logit of 0."""
    qkv = rows(1, tokens, 3 * 32)
    qkv[..., :64] /= 10
    qkv[..., :32] += 10
    qkv[..., 32:64] -= 10
    assert_no_worse(call(ops.attention, 1, impl="triton"), call(ops.attention, 1, impl="sdpa"), [qkv], torch.float32)


def test_huge_logits_do_not_overflow(tiles: None) -> None:
    """Up to +-20000, which overflow unless softmax subtracts the maximum."""
    qkv = rows(1, 70, 3 * 32)
    qkv[..., :64] *= 70
    qkv.requires_grad_()
    out = ops.attention(qkv, 1, impl="triton")
    expected = reference.packed_attention(qkv.double(), 1)
    assert (out - expected).abs().max() < 1e-3
    assert torch.autograd.grad(out, qkv, rows(*out.shape))[0].isfinite().all()


def test_one_dominating_key(tiles: None) -> None:
    """Exactly: if one key has all the weight, each output is its value."""
    qkv = rows(1, 150, 3 * 32)
    qkv[..., :32] = 8.0
    qkv[:, 77, 32:64] = 200.0
    out = ops.attention(qkv, 1, impl="triton")
    assert torch.equal(out, qkv[:, 77:78, 64:].expand(out.shape))


@pytest.mark.parametrize("value", [1.0, -0.75])
def test_weights_sum_to_one(value: float, tiles: None) -> None:
    qkv = rows(1, 150, 3 * 32)
    qkv[..., 64:] = value
    out = ops.attention(qkv, 1, impl="triton")
    torch.testing.assert_close(out, torch.full_like(out, value), rtol=0, atol=4e-7)


def test_order_of_keys_does_not_matter(tiles: None) -> None:
    keys, query = rows(1, 150, 2 * 32), rows(1, 9, 32, seed=1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    outs = [ops.attention(x, 1, query=query, impl="triton") for x in (keys, keys[:, order])]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_two_runs_agree_bitwise() -> None:
    starts, qkv = offsets(0, 60, 100), rows(110, 3 * WIDTH)

    def run() -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = ops.attention(leaf, HEADS, offsets=starts, max_length=60, impl="triton")
        return out.detach(), torch.autograd.grad(out, leaf, out.detach().sin())[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_one_block_is_two_plain_attentions() -> None:
    qkv, context = rows(2, 30, 3 * WIDTH), 21
    out = ops.attention(qkv, HEADS, target_blocks=(1, 9), impl="triton")
    query, key_value = qkv.split([WIDTH, 2 * WIDTH], dim=-1)
    torch.testing.assert_close(out[:, :context], ops.attention(qkv[:, :context], HEADS, impl="triton"))
    target = ops.attention(key_value, HEADS, query=query[:, context:], impl="triton")
    torch.testing.assert_close(out[:, context:], target)


@pytest.mark.parametrize("impl", ["triton", "eager", *ON_A_CPU])
@pytest.mark.parametrize("structured", [False, True])
def test_padding_is_zero_whatever_it_holds(structured: bool, impl: str) -> None:
    qkv = rows(300, 3 * 32)
    qkv[31:] = torch.nan
    qkv.requires_grad_()
    keywords = {"target_blocks": (2, 3)} if structured else {}
    out = ops.attention(qkv, 1, offsets=offsets(0, 11, 11, 31), max_length=20, impl=impl, **keywords)
    upstream = rows(300, 32)
    upstream[31:] = 7.0
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    assert not out[31:].any() and out[:31].isfinite().all()
    assert not grad[31:].any() and grad[:31].isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_lengths_that_break_their_promise_are_loud(impl: str) -> None:
    qkv, starts = rows(30, 3 * 32), offsets(0, 10, 30)
    out = ops.attention(qkv, 1, offsets=starts, max_length=15, impl=impl)
    assert out[:10].isfinite().all() and out[10:25].isnan().all()
    out = ops.attention(qkv, 1, offsets=starts, max_length=20, target_blocks=(4, 3), impl=impl)
    assert out[:10].isnan().any() and out[10:].isfinite().all()
    out = ops.attention(qkv, 1, offsets=starts, max_length=20, target_blocks=(3, 3), impl=impl)
    assert out.isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the host knows no lengths")
def test_lengths_that_break_their_promise_are_an_error_where_they_are_known() -> None:
    qkv, starts = rows(30, 3 * 32), offsets(0, 10, 30)
    with pytest.raises(ValueError, match="a sequence has 20 tokens, more than the 15 that it may have"):
        ops.attention(qkv, 1, offsets=starts, max_length=15, impl="sdpa")
    with pytest.raises(ValueError, match=r"target_blocks \(4, 3\) do not fit into sequences of 10 tokens"):
        ops.attention(qkv, 1, offsets=starts, max_length=20, target_blocks=(4, 3), impl="sdpa")


@pytest.mark.parametrize("impl", ["triton", "eager", "sdpa"])
@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend(batch: int, queries: int, keys: int, impl: str) -> None:
    """Queries without keys get zeros, keys without queries zero gradients."""
    leaves = [rows(batch, keys, 2 * WIDTH).requires_grad_(), rows(batch, queries, WIDTH).requires_grad_()]
    out = ops.attention(leaves[0], HEADS, query=leaves[1], impl=impl)
    assert out.shape == (batch, queries, WIDTH) and not out.any()
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("impl", ["triton", *ON_A_CPU])
def test_no_sequence_but_padding(impl: str) -> None:
    qkv = rows(7, 3 * WIDTH).requires_grad_()
    out = ops.attention(qkv, HEADS, offsets=offsets(0), max_length=0, impl=impl)
    assert not out.any() and not torch.autograd.grad(out, qkv, torch.ones_like(out))[0].any()


def test_nothing_is_stored_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = rows(1, 5, 3 * WIDTH)
    stored = []
    fused = door._attention
    monkeypatch.setattr(door, "_attention", lambda *args: stored.append(fused(*args)) or stored[-1])
    ops.attention(qkv, HEADS, impl="triton")
    qkv.requires_grad_()
    with torch.no_grad():
        ops.attention(qkv, HEADS, impl="triton")
    ops.attention(qkv, HEADS, impl="triton")
    assert [lse.shape for _, lse in stored] == [(0,), (0,), (HEADS, 5)]


@pytest.mark.parametrize("form", ["self", "query", "packed", "structured"])
def test_registration(form: str) -> None:
    starts, query_starts = offsets(0, 3, 8), offsets(0, 2, 6)
    packed = form in ("packed", "structured")
    qkv = rows(9, 3 * WIDTH) if packed else rows(2, 7, (2 if form == "query" else 3) * WIDTH)
    query = rows(7, WIDTH).requires_grad_() if form == "query" else None
    sides = (starts if packed else None, query_starts if form == "query" else None)
    sizes = (HEADS, 5 if packed else 0, 4 if form == "query" else 0, *((1, 2) if form == "structured" else (0, 0)))
    arguments = (qkv.requires_grad_(), query, *sides, *sizes)
    torch.library.opcheck(door._attention, (*arguments, True))
    torch.library.opcheck(
        door._attention, (qkv.detach(), None if query is None else query.detach(), *sides, *sizes, False)
    )
    out, lse = (x.detach() for x in door._attention(*arguments, True))
    saved = (rows(*out.shape, seed=2), qkv.detach(), None if query is None else query.detach(), out, lse)
    torch.library.opcheck(door._attention_backward, (*saved, *sides, *sizes))


@pytest.mark.parametrize("wrapper", ["compiled", "checkpointed"])
@pytest.mark.parametrize("impl", ["auto", "triton", "eager", "sdpa"])
@pytest.mark.parametrize("form", ["fixed", "packed", "structured"])
def test_compiled_and_checkpointed(form: str, impl: str, wrapper: str) -> None:
    """Output and gradient equal those of the plain call, without graph break; tracing makes the choice.

    Compiled, "auto" may choose otherwise for packed sequences, as one program must hold for all lengths.
    """
    if form == "packed" and impl == "sdpa":
        pytest.skip("cannot run compiled")
    qkv = rows(14, 3 * WIDTH) if form == "packed" else rows(2, 14, 3 * WIDTH)
    keywords: dict[str, Any] = {"structured": {"target_blocks": (2, 3)}}.get(form, {})
    if form == "packed":
        keywords = {"offsets": offsets(0, 5, 13), "max_length": 8}

    def attend(x: Tensor) -> Tensor:
        return ops.attention(x * 1.5, HEADS, impl=impl, **keywords)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = function(leaf)
        return out, torch.autograd.grad(out, leaf, out.detach().cos())[0]

    if wrapper == "compiled":
        torch._dynamo.reset()  # else these many forms exceed the limit of recompilations
        wrapped = torch.compile(attend, fullgraph=True, backend="aot_eager")
    else:
        wrapped = lambda x: checkpoint(attend, x, use_reentrant=False)  # noqa: E731
    rtol, atol = (1e-5, 4e-6) if (impl, form, wrapper) == ("auto", "packed", "compiled") else (0, 0)
    for expected, actual in zip(run(attend), run(wrapped), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_one_compiled_program_serves_a_range_of_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 12, 17):
        qkv = rows(2, tokens, 3 * WIDTH)
        with torch.compiler.set_stance("default" if tokens == 9 else "fail_on_recompile"):
            assert torch.equal(compiled(qkv, HEADS, impl="triton"), ops.attention(qkv, HEADS, impl="triton"))


def test_flops_are_those_of_sdpa() -> None:
    """torch counts none for its CPU kernel, so compare with its formulas."""
    query, key = (2, HEADS, 5, DIM), (2, HEADS, 9, DIM)
    expected = sdpa_flop_count(query, key, key) + sdpa_backward_flop_count(query, query, key, key)

    def count(args: Sequence[Tensor], **keywords: Any) -> int:
        leaves = [x.requires_grad_() for x in args]
        with FlopCounterMode(display=False) as counter:
            out = call(ops.attention, impl="triton", **keywords)(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        return counter.get_total_flops()

    assert count([rows(2, 9, 2 * WIDTH), rows(2, 5, WIDTH)]) == expected == 14 * 2 * 5 * 9 * WIDTH
    starts = offsets(0, 2, 2, 9)
    assert count([rows(11, 3 * WIDTH)], offsets=starts, max_length=8) == 14 * (2 * 2 + 7 * 7) * WIDTH
    # 4 context rows see 4 keys, 6 rows of blocks see 4 + 3
    assert count([rows(1, 10, 3 * WIDTH)], target_blocks=(2, 3)) == 14 * (4 * 4 + 6 * 7) * WIDTH
    starts = offsets(0, 10, 10, 17)
    packed = count([rows(20, 3 * WIDTH)], offsets=starts, max_length=12, target_blocks=(2, 3))
    assert packed == 14 * (4 * 4 + 6 * 7 + 1 + 6 * 4) * WIDTH


def test_flops_of_fake_offsets_are_an_upper_bound() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        qkv, starts = torch.empty(11, 3 * WIDTH), torch.empty(4, dtype=torch.int32)
        assert door._flops(qkv, None, starts, None, HEADS, 8, 0, 0, 0) == 4 * 3 * 8 * 8 * WIDTH


def test_eager_in_fp64_is_the_reference() -> None:
    qkv = rows(2, 28, 3 * WIDTH).double()
    for keywords in ({}, {"target_blocks": (3, 5)}):
        expected = reference.packed_attention(qkv, HEADS, **keywords)
        torch.testing.assert_close(ops.attention(qkv, HEADS, impl="eager", **keywords), expected)


def test_lengths_fall_into_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = []
    monkeypatch.setattr(door, "choose_attention", lambda *args: buckets.append(args[5]) or "eager")
    for tokens in (1, 32, 33, 84, 1024, 1025):
        ops.attention(rows(1, tokens, 3), 1)
        ops.attention(rows(1, 2), 1, query=rows(1, 1, 1), offsets=offsets(0, 1), max_length=tokens)
    assert buckets == [b for bucket in (32, 32, 64, 96, 1024, 0) for b in (bucket, bucket)]


def test_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    qkv = rows(1, 4, 3 * WIDTH).cpu()
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        for _ in range(2):
            ops.attention(qkv, HEADS)
            torch.compile(ops.attention, fullgraph=True, backend="eager")(qkv, HEADS)
            ops.attention(qkv, HEADS, impl="eager")
    assert caplog.messages == ["attention: sdpa (the tensors are on cpu)", "attention: eager (asked for)"]


@pytest.mark.parametrize(
    "shape, keywords, message",
    [
        ((2, 5, 3 * WIDTH + 1), {}, f"last dimension of qkv, {3 * WIDTH + 1}, is not 3 "),
        ((5, 3 * WIDTH), {}, r"qkv \(5, 144\) is not \[B, K, width\] without offsets"),
        ((2, 5, 3 * WIDTH), {"offsets": offsets(0, 5)}, r"qkv \(2, 5, 144\) is not \[T, width\] with offsets"),
        ((5, 3 * WIDTH), {"offsets": offsets(0, 5)}, "offsets need max_length, the longest sequence, got None"),
        ((5, 3 * WIDTH), {"offsets": offsets(0, 5).long(), "max_length": 5}, r"offsets are torch.int64 \(2,\) on"),
        ((2, 5, 2 * WIDTH), {"query": rows(2, 5, 24)}, r"query \(2, 5, 24\) does not go with"),
        ((2, 5, 2 * WIDTH), {"query": rows(2, 5, WIDTH).half()}, "query is torch.float16 on"),
        ((2, 5, 2 * WIDTH), {"query": rows(3, 5, WIDTH)}, "qkv has 2 sequences, query 3"),
        ((2, 5, 2 * WIDTH), {"query": rows(2, 5, WIDTH), "target_blocks": (1, 2)}, "cannot be combined with query"),
        ((2, 5, 3 * WIDTH), {"query_offsets": offsets(0, 5)}, "query_offsets are given without query"),
        ((2, 5, 3 * WIDTH), {"target_blocks": (2, 3)}, r"target_blocks \(2, 3\) do not fit into sequences of 5"),
        ((2, 5, 3 * WIDTH), {"target_blocks": (0, 3)}, r"target_blocks \(0, 3\) do not fit"),
    ],
)
def test_arguments_that_do_not_match_are_refused(
    shape: tuple[int, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(rows(*shape), HEADS, **keywords)


def test_every_tile_in_use_is_compiled_ahead_of_time() -> None:
    """Widths 24 and 32 share tiles; they differ in a mask only."""
    kernel = pytest.importorskip("cjepa_fast.kernels.attention")
    assert tuple(kernel.PARTS) == choice.TRITON_HEAD_DIMS and choice.TOKENS[-1] == 1024

    def key(jit: Any, dtype: str, head_dim: int, tile: dict[str, Any]) -> tuple[Any, ...]:
        sizes = ("BLOCK_Q", "BLOCK_K", "BLOCK", "INNER", "ONE_PASS", "num_warps", "num_stages")
        return jit, dtype, head_dim, *(tile.get(name) for name in sizes)

    compiled = {
        key(entry["kernel"], entry["signature"]["query"], entry["constants"]["D"], entry["constants"])
        for entry in kernel.AOT
    }
    lengths = (1, 32, 33, 64, 65, 128, 129, 1024)
    for head_dim in (24, 64, 80, 88, 128):
        for queries, keys, dtype in itertools.product(lengths, lengths, ("bf16", "fp32")):
            fwd = kernel._fwd_tile(head_dim, queries, keys, dtype == "bf16")
            assert key(kernel._fwd_kernel, f"*{dtype}:16", head_dim, fwd) in compiled, (dtype, head_dim, queries, keys)
            for structured in (False, True):
                bwd = kernel._bwd_tile(head_dim, keys, dtype == "bf16", structured)
                assert key(kernel._bwd_kernel, f"*{dtype}:16", head_dim, bwd) in compiled, (dtype, head_dim, keys)
