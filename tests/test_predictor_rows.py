"""Gathering unique tokens into sequences: the operation and its kernel, interpreted in fp32 without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import ops, reference
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _predictor_rows as door
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where hardware rounds, so only a GPU tests 16 bits.
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.float16, marks=pytest.mark.gpu),
]
IMPLS = ["eager", "triton"]
# (B, Kc, M, Kt, W, N): aligned; partial; nothing a multiple of anything, and rows of the table with more copies than a
# program takes at once; rows without a copy; one token each
SHAPES = [(2, 32, 4, 32, 128, 36), (2, 5, 3, 7, 192, 36), (3, 11, 4, 25, 131, 5), (2, 3, 1, 2, 24, 50),
          (1, 1, 1, 1, 24, 1)]  # fmt: skip


def inputs(shape: tuple[int, ...], packed: bool = False) -> dict[str, Any]:
    """Return arguments of `predictor_rows`; packed contexts have random lengths, also 0, and NaN as padding."""
    batch, kept, blocks, length, width, count = shape
    generator = torch.Generator().manual_seed(0)
    context, offsets = torch.randn(batch, kept, width, generator=generator), None
    if packed:
        lengths = torch.randint(kept + 1, (batch,), generator=generator)
        lengths[batch // 2] = kept if batch == 1 else 0
        offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
        context = context.flatten(0, 1)
        context[int(offsets[-1]) :] = float("nan")
    arguments = dict(
        context=context, table=torch.randn(count, width, generator=generator),
        target_indices=torch.randint(count, (batch, blocks, length), generator=generator), offsets=offsets,
    )  # fmt: skip
    return {name: x if x is None else x.to(DEVICE) for name, x in arguments.items()}


def wave(like: Tensor) -> Tensor:
    """Return a non-constant upstream gradient."""
    return torch.arange(1, like.numel() + 1, device=like.device).double().sin().view(like.shape).to(like.dtype)


def run(f: Callable[..., Tensor], given: dict[str, Any], upstream: Callable[[Tensor], Tensor] = wave) -> list[Tensor]:
    """Return the sequences and the gradients of context and table."""
    leaves = [given[name].detach().clone().requires_grad_() for name in ("context", "table")]
    output = f(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream(output))]


def operation(given: dict[str, Any], impl: str = "triton") -> Callable[..., Tensor]:
    """Return `predictor_rows` as a function of its differentiable arguments."""
    return lambda context, table: ops.predictor_rows(**{**given, "context": context, "table": table}, impl=impl)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_no_worse_than_torch(shape: tuple[int, ...], packed: bool, dtype: torch.dtype) -> None:
    given = inputs(shape, packed)
    if packed:  # the oracle wants finite values
        given["context"] = given["context"].nan_to_num()

    def plain(context: Tensor, table: Tensor) -> Tensor:
        return reference.predictor_rows(context, table, given["target_indices"], given["offsets"])

    # the interpreter adds the rows of a tile in sequence, torch and a GPU in a tree
    factor = 8.0 if DEVICE == "cpu" else 2.0
    assert_no_worse(operation(given), plain, [given["context"], given["table"]], dtype, factor)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_copied_bit_for_bit(shape: tuple[int, ...], packed: bool, impl: str) -> None:
    """NaN in the padding reaches no output."""
    given = inputs(shape, packed)
    out = ops.predictor_rows(**given, impl=impl)
    assert out.isfinite().all() and torch.equal(out, reference.predictor_rows(**given))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    st.tuples(
        st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20), st.integers(1, 150),
        st.integers(1, 40),
    ),
    st.booleans(),
)  # fmt: skip
def test_any_shape(shape: tuple[int, ...], packed: bool) -> None:
    given = inputs(shape, packed)
    for a, b in zip(run(operation(given), given), run(operation(given, "eager"), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_block_is_what_it_would_be_alone(impl: str) -> None:
    given = inputs(SHAPES[2])
    tokens = ops.predictor_rows(**given, impl=impl)
    for block in range(tokens.shape[1]):
        alone = given | {"target_indices": given["target_indices"][:, block : block + 1]}
        assert torch.equal(ops.predictor_rows(**alone, impl=impl)[:, 0], tokens[:, block])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
def test_one_block_of_all_targets_is_a_shared_context(packed: bool, impl: str) -> None:
    """[context | block 1 | ... | block M] for each image."""
    given = inputs(SHAPES[2], packed)
    given["target_indices"] = given["target_indices"].flatten(1)[:, None]
    out, offsets = ops.predictor_rows(**given, impl=impl), given["offsets"]
    for image, targets in enumerate(given["target_indices"].flatten(1)):
        if packed:
            context = given["context"][int(offsets[image]) : int(offsets[image + 1])]
            sequence = out[int(offsets[image]) + image * len(targets) :][: len(context) + len(targets)]
        else:
            context, sequence = given["context"][image], out[image, 0]
        assert torch.equal(sequence, torch.cat([context, given["table"][targets]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_contexts_of_equal_length_equal_batched_ones(impl: str) -> None:
    given = inputs(SHAPES[2])
    batch, kept, _ = given["context"].shape
    starts = kept * torch.arange(batch + 1, device=DEVICE, dtype=torch.int32)
    packed = given | {"context": given["context"].flatten(0, 1), "offsets": starts}
    (out, context_grad, table_grad), ours = run(operation(given, impl), given), run(operation(packed, impl), packed)
    assert_equal(ours[:1], [out.flatten(0, -2)])
    if impl == "triton":
        assert_equal(ours[1:], [context_grad.flatten(0, 1), table_grad])
    else:  # torch sums in another order
        torch.testing.assert_close(ours[1:], [context_grad.flatten(0, 1), table_grad], rtol=1e-5, atol=1e-5)


def test_sequence_offsets_cut_the_packed_tokens() -> None:
    given = inputs(SHAPES[2], packed=True)
    offsets, (batch, blocks, length) = given["offsets"], given["target_indices"].shape
    tokens = ops.predictor_rows(**given, impl="triton")
    starts = ops.sequence_offsets(offsets, blocks, length)
    assert starts.dtype == torch.int32 and len(starts) == batch * blocks + 1 and not tokens[int(starts[-1]) :].any()
    for image in range(batch):
        alone = given | {
            "context": given["context"][None, int(offsets[image]) : int(offsets[image + 1])],
            "target_indices": given["target_indices"][image : image + 1], "offsets": None,
        }  # fmt: skip
        for block, expected in enumerate(ops.predictor_rows(**alone, impl="triton")[0]):
            start, end = starts[image * blocks + block :][:2].tolist()
            assert torch.equal(tokens[start:end], expected)


@pytest.mark.parametrize("shift", [-40, 20, 40])
def test_offsets_beyond_the_context_write_nothing_outside(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong offsets on the device cannot be refused without waiting for it, but must not touch other memory."""
    given = inputs(SHAPES[1], packed=True)
    given["offsets"] += shift
    memory: list[Tensor] = []

    def allocate(*size: Any, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 else size
        memory.append(torch.full((3, *shape), 7.0, **options))
        return memory[-1][1]

    monkeypatch.setattr(torch, "empty", allocate)
    ops.predictor_rows(**given, impl="triton")
    monkeypatch.undo()
    (tokens,) = memory
    assert (tokens[::2] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_work_done_once_for_unique_tokens_is_that_done_for_each_sequence(impl: str) -> None:
    """A layer that acts on each token alone, before or after the gather: the same sequences and gradients."""
    given = {
        name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs(SHAPES[1]).items()
    }
    given["weight"] = wave(torch.empty(12, 192, device=DEVICE, dtype=torch.float64))
    leaves = [given[name].requires_grad_() for name in ("context", "table", "weight")]
    context, table, weight = (leaf.float() if impl == "triton" else leaf for leaf in leaves)

    def layer(x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), weight)

    def sequences(context: Tensor, table: Tensor) -> Tensor:
        return ops.predictor_rows(context, table, given["target_indices"], impl=impl)

    results = []
    for out in (sequences(layer(context), layer(table)), layer(sequences(context, table))):
        results.append([out, *torch.autograd.grad(out, leaves, wave(out))])
    tolerance = 1e-4 if impl == "triton" else 1e-10
    for before, behind in zip(*results, strict=True):
        torch.testing.assert_close(before, behind, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_sums_of_integers_are_exact(shape: tuple[int, ...], packed: bool, impl: str) -> None:
    """Gradients need no tolerance: sums over the M copies of a context token, and over all copies of a table's row."""
    given = inputs(shape, packed)
    truth = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in given.items()}

    def integers(like: Tensor) -> Tensor:
        return (7 * torch.arange(like.numel(), device=like.device) % 101 - 50).view(like.shape).to(like.dtype)

    def plain(context: Tensor, table: Tensor) -> Tensor:
        return reference.predictor_rows(context, table, given["target_indices"], given["offsets"])

    for ours, true in zip(
        run(operation(given, impl), given, integers)[1:], run(plain, truth, integers)[1:], strict=True
    ):
        assert torch.equal(ours.double(), true)


@pytest.mark.gpu
def test_table_sums_16_bits_in_fp32() -> None:
    """2,048 times 1 + 1/128 in bf16: a sum in bf16 stays at 256."""
    given = inputs((16, 1, 4, 32, 128, 1))
    given = {name: x.bfloat16() if x is not None and x.is_floating_point() else x for name, x in given.items()}
    _, context_grad, table_grad = run(operation(given), given, lambda like: torch.full_like(like, 1 + 1 / 128))
    assert (table_grad == 2064).all() and (context_grad == 4 + 4 / 128).all()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_same_bits_each_time(packed: bool) -> None:
    given = inputs(SHAPES[2], packed)
    assert_equal(run(operation(given), given), run(operation(given), given))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("impl", IMPLS)
def test_index_dtypes_agree_bitwise(impl: str, dtype: torch.dtype) -> None:
    given = inputs(SHAPES[2])
    narrow = given | {"target_indices": given["target_indices"].to(dtype)}
    assert_equal(run(operation(narrow, impl), given), run(operation(given, impl), given))


@pytest.mark.parametrize("count", [9, 32_767, 40_000])
def test_order_by_index(count: int) -> None:
    """Also if a table has more rows than its indices' type can count."""
    kernel = pytest.importorskip("cjepa_fast.kernels.predictor_rows")
    indices = torch.tensor([3, 0, 7, 3, -1, 0, 3], dtype=torch.int16, device=DEVICE)
    order, starts = kernel._by_index(indices, count)
    assert order.tolist() == [4, 1, 5, 0, 3, 6, 2] and starts.dtype == torch.int32
    assert starts.tolist() == [1, 3, 3, 3, 6, 6, 6, 6, *[7] * (count - 7)]


@pytest.mark.parametrize("packed", [False, True])
def test_strided_tensors_agree_bitwise(packed: bool) -> None:
    given = inputs(SHAPES[1], packed)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-1)[..., 0]

    moved = {name: x if x is None else strided(x) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in moved.values() if x is not None)
    f, g = operation(moved), operation(given)
    expected = run(g, given)
    assert_equal(run(lambda context, table: f(strided(context), strided(table)), given), expected)
    assert_equal(run(g, given, lambda like: strided(wave(like))), expected)


def test_nan_of_one_row_stays_there() -> None:
    """A target's gradient reaches its own row of the table and no other."""
    given = inputs(SHAPES[1])

    def upstream(like: Tensor) -> Tensor:
        grads = wave(like)
        grads[1, 2, 5 + 3] = float("nan")
        return grads

    _, context_grad, table_grad = run(operation(given), given, upstream)
    place = int(given["target_indices"][1, 2, 3])
    assert context_grad.isfinite().all()
    assert table_grad.isnan().any(1).nonzero().flatten().tolist() == [place] and table_grad[place].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 24, 9), (2, 0, 2, 4, 24, 9), (2, 3, 2, 0, 24, 9), (2, 3, 0, 4, 24, 9)])
def test_nothing(shape: tuple[int, ...], impl: str) -> None:
    batch, kept, blocks, length, width, _ = shape
    given = inputs(shape)
    out, context_grad, table_grad = run(operation(given, impl), given)
    assert out.shape == (batch, blocks, kept + length, width)
    torch.testing.assert_close(context_grad, wave(out)[:, :, :kept].sum(1))
    expected = torch.zeros_like(given["table"]).index_add(
        0, given["target_indices"].flatten(), wave(out)[:, :, kept:].flatten(0, 2)
    )
    torch.testing.assert_close(table_grad, expected)


@pytest.mark.parametrize("bad", [-1, 36, 2**32 + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_index_outside_the_table_is_loud(packed: bool, bad: int) -> None:
    """Triton: NaN in this token alone, whose gradient is ignored. Eager: an error."""
    given = inputs(SHAPES[1], packed)
    expected = run(operation(given), given)
    first = int(given["target_indices"][0, 0, 0])
    given["target_indices"][0, 0, 0] = bad
    out, context_grad, table_grad = run(operation(given), given)
    assert out.flatten(0, -2).isnan().any(1).sum() == out.flatten(0, -2).isnan().all(1).sum() == 1
    others = torch.arange(36, device=DEVICE) != first
    assert torch.equal(context_grad, expected[1]) and torch.equal(table_grad[others], expected[2][others])
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            ops.predictor_rows(**given, impl="eager")


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    given = inputs((2, 5, 3, 4, 24, 9), packed)
    given["context"] = given["context"].nan_to_num().requires_grad_()
    given["table"].requires_grad_()
    context, table, indices, offsets = given.values()
    torch.library.opcheck(door._predictor_rows, (context, table, indices, offsets, None))
    grads = wave(door._predictor_rows(context, table, indices, offsets, None).detach())
    torch.library.opcheck(door._predictor_rows_backward, (grads, indices, offsets, list(context.shape), 9))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole_graph(packed: bool, impl: str) -> None:
    """No graph break, so no wait for the device; tracing makes the choice."""
    torch.compiler.reset()
    given = inputs(SHAPES[1], packed)
    f = operation(given, impl)

    def around(context: Tensor, table: Tensor) -> Tensor:
        return f(1.5 * context, 1.5 * table) + 1

    assert_equal(run(torch.compile(around, fullgraph=True, backend="aot_eager"), given), run(around, given))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_have_one_size_to_a_compiler(packed: bool, impl: str) -> None:
    """Not a sum of sizes, by which Inductor cannot divide a GPU's loops over all elements."""
    torch.compiler.reset()
    given, sizes = inputs(SHAPES[1], packed), []

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        ((out,),) = graph.graph.output_node().args
        sizes.append(out.meta["example_value"].shape[-2].node.expr)
        return graph.forward

    total = ops.predictor_rows(**given, impl=impl).shape[-2]
    compiled = torch.compile(ops.predictor_rows, dynamic=True, fullgraph=True, backend=capture)
    out = compiled(**given, total=total, impl=impl)
    assert_equal([out], [ops.predictor_rows(**given, impl=impl)])
    assert len(sizes) == 1 and sizes[0].is_Symbol, sizes


@pytest.mark.parametrize("packed", [False, True])
def test_under_activation_checkpointing(packed: bool) -> None:
    given = inputs(SHAPES[1], packed)
    f = operation(given)

    def again(*leaves: Tensor) -> Tensor:
        out = checkpoint(f, *leaves, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    assert_equal(run(again, given), run(f, given))


def test_no_flops() -> None:
    for impl in IMPLS:
        with FlopCounterMode(display=False) as counter:
            given = inputs(SHAPES[1])
            run(operation(given, impl), given)
        assert counter.get_total_flops() == 0


def test_impl_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(SHAPES[1])
    with pytest.raises(UserError, match="unknown impl 'cuda' for predictor_rows"):
        ops.predictor_rows(**given, impl="cuda")
    double = given | {"context": given["context"].double(), "table": given["table"].double()}
    with pytest.raises(UserError, match=r"cannot run predictor_rows: dtypes torch\.float64 are not"):
        ops.predictor_rows(**double, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="tensors are on cpu"):
        ops.predictor_rows(**{n: x if x is None else x.cpu() for n, x in given.items()}, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, 192)}, r"context \(2, 192\), table \(36, 192\) and target_indices \(2, 3, 7\) are"),
        ({"target_indices": torch.zeros(2, 3, dtype=torch.int64)}, r"target_indices \(2, 3\) are not"),
        ({"target_indices": torch.zeros(1, 3, 7, dtype=torch.int64)}, "context is of 2 images, target_indices of 1"),
        ({"target_indices": torch.zeros(2, 3, 7)}, r"target_indices is torch\.float32"),
        ({"table": torch.zeros(36, 191)}, r"table \(36, 191\)"),
        ({"table": torch.zeros(36, 192).half()}, r"table is torch\.float16, context torch\.float32"),
        ({"table": torch.zeros(36, 192, device="meta")}, "table is on meta, expected"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"nor with offsets \[T, W\]"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    moved = {n: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.predictor_rows(**inputs(SHAPES[1]) | moved)
    packed = inputs(SHAPES[1], packed=True)
    with pytest.raises(ValueError, match=r"offsets are torch\.int64 \(3,\), want torch\.int32 \(3,\)"):
        ops.predictor_rows(**packed | {"offsets": packed["offsets"].long()})
