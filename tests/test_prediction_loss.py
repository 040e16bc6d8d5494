"""The fused prediction loss: the kernel (interpreted in fp32 without a GPU), its registration and its choice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import losses, ops, reference
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _choice
from cjepa_fast.ops import _prediction_loss as door
from masking import make
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where hardware rounds, so only a GPU tests 16 bits.
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.float16, marks=pytest.mark.gpu),
]
KINDS = ["smooth_l1", "l2"]
# (B, M, K, D, N): aligned; rows of a partial last program; nothing a multiple of anything; wider than one program's
# share of rows; one row
SHAPES = [(2, 4, 16, 128, 64), (2, 3, 7, 192, 36), (3, 2, 5, 123, 17), (1, 2, 3, 1408, 9), (1, 1, 1, 96, 1)]


def inputs(
    shape: tuple[int, ...], index_dtype: torch.dtype = torch.int64, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions around smooth L1's corner, targets of mean 0.5 and deviation `spread`, random indices."""
    batch, blocks, length, width, patches = shape
    generator = torch.Generator().manual_seed(0)
    predictions = 1.5 * torch.randn(batch, blocks, length, width, generator=generator)
    targets = 0.5 + spread * torch.randn(batch, patches, width, generator=generator)
    indices = torch.randint(patches, (batch, blocks, length), generator=generator).to(index_dtype)
    return predictions.to(DEVICE), targets.to(DEVICE), indices.to(DEVICE)


def packed_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `inputs` with 1 to N packed targets per image, NaN as padding, and offsets."""
    predictions, targets, indices = inputs(shape)
    lengths = torch.arange(shape[0], device=DEVICE) * 5 % shape[-1] + 1
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    targets = targets.flatten(0, 1)
    targets[int(offsets[-1]) :] = float("nan")
    return predictions, targets, (indices % lengths[:, None, None]).short(), offsets


def closures(
    targets: Tensor, indices: Tensor, kind: str, dtype: torch.dtype, offsets: Tensor | None = None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the kernel and the reference as functions of the predictions, in their dtype."""
    rounded = targets.to(dtype)

    def fused(predictions: Tensor) -> Tensor:
        loss = ops.prediction_loss(predictions, rounded, indices, kind, offsets=offsets, impl="triton")
        return loss.to(predictions.dtype)

    def plain(predictions: Tensor) -> Tensor:
        return reference.prediction_loss(predictions, rounded.to(predictions.dtype), indices.long(), kind, offsets)

    return fused, plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_no_worse_than_torch(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    predictions, targets, indices = inputs(shape)
    assert_no_worse(*closures(targets, indices, kind, dtype), [predictions], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_targets_are_no_worse_than_torch(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    predictions, targets, indices, offsets = packed_inputs(shape)
    assert_no_worse(*closures(targets, indices, kind, dtype, offsets), [predictions], dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_union_of_the_masks_gives_the_loss_of_all_targets(impl: str, kind: str) -> None:
    """Bit for bit: the same rows from another place."""
    masks = make().sample(0, range(3), union=True)
    target, union, offsets, slots = (
        x.to(DEVICE) for x in (masks.target, masks.union, masks.union_offsets, masks.target_slot)
    )
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(*target.shape, 40, generator=generator).to(DEVICE)
    targets = torch.randn(3, 196, 40, generator=generator).to(DEVICE)
    image_of = torch.arange(3, device=DEVICE).repeat_interleave(offsets.diff())
    packed = torch.full((len(union), 40), float("nan"), device=DEVICE)
    packed[: int(offsets[-1])] = targets[image_of, union[: int(offsets[-1])].long()]

    def loss_and_grad(targets: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = predictions.clone().requires_grad_()
        loss = losses.prediction_loss(leaf, targets, indices, kind, offsets=offsets, impl=impl)
        return loss, torch.autograd.grad(loss * 0.3, leaf)[0]

    expected, actual = loss_and_grad(targets, target, None), loss_and_grad(packed, slots, offsets)
    assert expected[0].isfinite() and torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_low_variance(kind: str, dtype: torch.dtype) -> None:
    """A standard deviation near sqrt(eps) shows a wrong eps in every dtype."""
    predictions, targets, indices = inputs(SHAPES[1], spread=0.01)
    targets = targets - 0.5  # an offset would cost the rounded targets their digits
    assert_no_worse(*closures(targets, indices, kind, dtype), [predictions], dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32])
def test_index_dtypes_agree_bitwise(index_dtype: torch.dtype, kind: str) -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    expected = ops.prediction_loss(predictions, targets, indices, kind, impl="triton")
    actual = ops.prediction_loss(predictions, targets, indices.to(index_dtype), kind, impl="triton")
    assert torch.equal(expected, actual)


def test_strided_inputs_agree_bitwise() -> None:
    predictions, targets, indices = inputs(SHAPES[1])

    def loss_and_grad(predictions: Tensor, targets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        leaf = predictions.detach().requires_grad_()
        loss = ops.prediction_loss(leaf, targets, indices, impl="triton")
        return loss, torch.autograd.grad(loss * 0.3, leaf)[0]

    def stride(x: Tensor) -> Tensor:
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert not strided.is_contiguous()
        return strided

    expected = loss_and_grad(predictions, targets, indices)
    actual = loss_and_grad(stride(predictions), stride(targets), stride(indices))
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("shape", [(0, 4, 3, 8, 9), (2, 0, 3, 8, 9), (2, 4, 0, 8, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_predictions(kind: str, shape: tuple[int, ...], impl: str) -> None:
    predictions, targets, indices = inputs(shape)
    predictions.requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, kind, impl=impl)
    (grad,) = torch.autograd.grad(loss, predictions)
    sums_nothing = kind == "l2" and shape[0] * shape[1] > 0
    assert loss.item() == 0 if sums_nothing else loss.isnan()
    assert grad.shape == predictions.shape


def test_perfect_prediction_costs_nothing() -> None:
    """Exactly: tokens of equally many +1 and -1 are their own layer norm if eps vanishes beside the variance."""
    _, _, indices = inputs(SHAPES[0])
    targets = 1e4 * torch.tensor([1.0, -1.0], device=DEVICE).repeat(2, 64, 64)
    predictions = targets[:, :1, None].sign().repeat(1, 4, 16, 1).requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, "l2", impl="triton")
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, predictions)[0].any()


@pytest.mark.parametrize("bad", [-1, 36])
def test_index_outside_the_image_is_loud(bad: int) -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    indices[1, 1, 1] = bad
    predictions.requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, impl="triton")
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, predictions)
    assert grad[1, 1, 1].isnan().all() and grad[0].isfinite().all()
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            ops.prediction_loss(predictions, targets, indices, impl="eager")


@pytest.mark.parametrize("image, bad", [(0, -1), (1, -1), (0, 1), (2, 11)])
def test_slot_of_another_image_is_loud(image: int, bad: int) -> None:
    """Before the image's first target or behind its last, also if a neighbour has a target there."""
    predictions, targets, indices, offsets = packed_inputs(SHAPES[2])
    assert offsets.tolist() == [0, 1, 7, 18] and ops.prediction_loss(
        predictions, targets, indices, offsets=offsets, impl="triton"
    ).isfinite()  # fmt: skip
    indices[image, 1, 1] = bad
    predictions.requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, offsets=offsets, impl="triton")
    (grad,) = torch.autograd.grad(loss, predictions)
    assert loss.isnan() and grad[image, 1, 1].isnan().all() and grad.isnan().any(-1).sum() == 1
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            ops.prediction_loss(predictions, targets, indices, offsets=offsets, impl="eager")


@pytest.mark.parametrize("shift", [-100, 10**6])
def test_offsets_beyond_the_targets_are_loud(shift: int) -> None:
    """Wrong values on the device cannot be refused without waiting for it, but must not read other memory."""
    predictions, targets, indices, offsets = packed_inputs(SHAPES[1])
    assert ops.prediction_loss(predictions, targets, indices, offsets=offsets + shift, impl="triton").isnan()


def test_nan_reaches_loss_and_gradient() -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    predictions[1, 2, 3, 5] = float("nan")
    predictions.requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, impl="triton")
    (grad,) = torch.autograd.grad(loss, predictions)
    assert loss.isnan() and grad[1, 2, 3, 5].isnan() and grad.isnan().sum() == 1


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_targets_get_no_gradient(impl: str) -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    predictions.requires_grad_()
    targets.requires_grad_()
    ops.prediction_loss(predictions, targets, indices, impl=impl).backward()
    assert predictions.grad is not None and targets.grad is None


def test_backward_twice_gives_the_same_gradient() -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    predictions.requires_grad_()
    loss = ops.prediction_loss(predictions, targets, indices, impl="triton")
    first, second = (torch.autograd.grad(loss, predictions, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_stored_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    asked = []
    fused = door._prediction_loss
    monkeypatch.setattr(door, "_prediction_loss", lambda *args: asked.append(args[-1]) or fused(*args))
    ops.prediction_loss(predictions, targets, indices, impl="triton")
    predictions.requires_grad_()
    with torch.no_grad():
        ops.prediction_loss(predictions, targets, indices, impl="triton")
    ops.prediction_loss(predictions, targets, indices, impl="triton")
    assert asked == [False, False, True]


@pytest.mark.gpu
def test_fp16_gradient_survives_a_small_divisor() -> None:
    """1 / (B M K D) = 2.3e-8 is 0 in fp16, so the gradient must apply it together with the loss scale."""
    predictions, targets, indices = inputs((8, 4, 1024, 1280, 64))
    predictions = predictions.half().requires_grad_()
    loss = ops.prediction_loss(predictions, targets.half(), indices, impl="triton")
    (grad,) = torch.autograd.grad(loss * 2.0**20, predictions)
    assert grad.abs().max().item() == pytest.approx(2.0**20 / predictions.numel(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_registration(kind: str, with_residual: bool) -> None:
    predictions, targets, indices = inputs((2, 2, 3, 24, 9))
    predictions.requires_grad_(with_residual)
    torch.library.opcheck(door._prediction_loss, (predictions, targets, indices, None, kind, with_residual))
    predictions, targets, indices, offsets = packed_inputs((2, 2, 3, 24, 9))
    predictions.requires_grad_(with_residual)
    torch.library.opcheck(door._prediction_loss, (predictions, targets, indices, offsets, kind, with_residual))
    upstream = torch.tensor(0.7, device=DEVICE)
    torch.library.opcheck(door._prediction_loss_backward, (upstream, predictions.detach(), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_compiled_whole_graph(impl: str, packed: bool, kind: str) -> None:
    """Forward and backward equal the uncompiled function, without graph break; tracing makes the choice."""
    predictions, targets, indices, *rest = (packed_inputs if packed else inputs)(SHAPES[1])
    keywords = {"offsets": rest[0]} if packed else {}

    def run(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = predictions.clone().requires_grad_()
        loss = f(leaf)
        return loss, torch.autograd.grad(0.3 * loss, leaf)[0]

    def loss(x: Tensor) -> Tensor:
        return ops.prediction_loss(x * 1.5, targets, indices, kind, impl=impl, **keywords)

    for expected, actual in zip(run(loss), run(torch.compile(loss, fullgraph=True, backend="aot_eager")), strict=True):
        assert torch.equal(expected, actual)


def test_flops_do_not_depend_on_the_implementation() -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    predictions.requires_grad_()
    counts = []
    for impl in ("eager", "triton"):
        with FlopCounterMode(display=False) as counter:
            ops.prediction_loss(predictions, targets, indices, impl=impl).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_eager_in_fp64_is_the_reference() -> None:
    predictions, targets, indices = inputs(SHAPES[2])
    predictions, targets = predictions.double(), targets.double()
    for kind in KINDS:
        actual = losses.prediction_loss(predictions, targets, indices, kind)
        torch.testing.assert_close(actual, reference.prediction_loss(predictions, targets, indices, kind))
    predictions, targets, indices, offsets = packed_inputs(SHAPES[2])
    predictions, targets = predictions.double(), targets.double()
    for kind in KINDS:
        actual = losses.prediction_loss(predictions, targets, indices, kind, offsets=offsets)
        expected = reference.prediction_loss(predictions, targets, indices.long(), kind, offsets)
        torch.testing.assert_close(actual, expected)


def test_impl_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        ops.prediction_loss(predictions, targets, indices, impl="cuda")
    with pytest.raises(UserError, match=r"cannot run prediction_loss: dtypes torch\.float64"):
        ops.prediction_loss(predictions.double(), targets, indices, impl="triton")
    with pytest.raises(UserError, match="wider than 4096"):
        ops.prediction_loss(*inputs((1, 1, 1, 4097, 1)), impl="triton")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(UserError, match="tensors are on cpu"):
            ops.prediction_loss(predictions.cpu(), targets.cpu(), indices.cpu(), impl="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.prediction_loss(predictions, targets, indices, impl="triton")
    assert ops.prediction_loss(predictions, targets, indices).isfinite()


def test_shapes_that_do_not_match_are_refused() -> None:
    predictions, targets, indices = inputs(SHAPES[1])
    cases = [(targets[1:], indices), (targets[..., 1:], indices), (targets[0], indices), (targets, indices[..., 1:])]
    for wrong_targets, wrong_indices in cases:
        with pytest.raises(ValueError, match=r"predictions \(2, 3, 7, 192\) want"):
            ops.prediction_loss(predictions, wrong_targets, wrong_indices)
    predictions, targets, indices, offsets = packed_inputs(SHAPES[1])
    for wrong_targets in (targets[..., 1:], targets[None]):
        with pytest.raises(ValueError, match=r"want targets \[T, 192\] with offsets and indices"):
            ops.prediction_loss(predictions, wrong_targets, indices, offsets=offsets)
    for wrong_offsets in (offsets[1:], offsets.long()):
        with pytest.raises(ValueError, match=r"offsets are torch\.int.* want torch\.int32 \(3,\)"):
            ops.prediction_loss(predictions, targets, indices, offsets=wrong_offsets)


def test_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    predictions, targets, indices = inputs(SHAPES[4])
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        for _ in range(2):
            ops.prediction_loss(predictions.cpu(), targets.cpu(), indices.cpu())
            torch.compile(ops.prediction_loss, fullgraph=True, backend="eager")(predictions, targets, indices)
            ops.prediction_loss(predictions, targets, indices, impl="triton")
    expected = ["prediction_loss: eager (the tensors are on cpu)", "prediction_loss: triton (asked for)"]
    if DEVICE == "cuda":
        expected.insert(1, "prediction_loss: triton (the tensors are on cuda)")
    assert caplog.messages == expected
