"""Losses against the papers' formulas in fp64, and against properties that need no tolerance."""

from __future__ import annotations

import math

import pytest
import torch

from cjepa_fast import reference
from cjepa_fast.errors import UserError
from cjepa_fast.losses import block_vicreg, context_target_vicreg, prediction_loss, vicreg
from cjepa_fast.networks.heads import GlobalBatchNorm, Projector


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Return non-constant values, correlated across dimensions, with uneven variances."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(count * 1.7 + phase) + 0.3 * torch.cos(count**2)
    return wave.reshape(shape) * torch.linspace(0.2, 2, shape[-1])


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 16, 32), (3, 1, 5, 9, 17), (1, 3, 1, 1, 7)])
def test_prediction_loss_equals_reference(kind: str, shape: tuple[int, ...]) -> None:
    batch, blocks, kept, patches, width = shape
    predictions = (2 * wave(batch, blocks, kept, width)).requires_grad_()
    targets = wave(batch, patches, width, phase=1)
    indices = torch.randint(patches, (batch, blocks, kept), generator=torch.Generator().manual_seed(0))
    ours = prediction_loss(predictions, targets, indices, kind)
    again = predictions.detach().clone().requires_grad_()
    truth = reference.prediction_loss(again, targets, indices, kind)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(ours * 1.7, predictions)
    (expected,) = torch.autograd.grad(truth * 1.7, again)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_prediction_loss_by_hand() -> None:
    """Targets (1, 3) and (5, 1) layer-normed are (-1, 1), (1, -1); errors 0.5 and 3 take both smooth-L1 branches."""
    targets = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]], dtype=torch.float64)
    predictions = torch.tensor([[[[1.5, -4.0]], [[-1.0, 1.0]]]], dtype=torch.float64)  # blocks predict patches 1, 0
    indices = torch.tensor([[[1], [0]]])
    smooth_l1 = (0.5**2 / 2 + (3 - 0.5) + 0 + 0) / 4
    l2 = (0.5**2 + 3**2 + 0) / 2
    assert prediction_loss(predictions, targets, indices).item() == pytest.approx(smooth_l1, rel=1e-4)
    assert prediction_loss(predictions, targets, indices, "l2").item() == pytest.approx(l2, rel=1e-4)
    with pytest.raises(UserError, match="unknown prediction loss 'l1'; known: smooth_l1, l2"):
        prediction_loss(predictions, targets, indices, "l1")


@pytest.mark.parametrize(("batch", "blocks", "width"), [(8, 4, 16), (5, 2, 33), (2, 3, 1), (64, 4, 8)])
def test_block_vicreg_equals_the_loop_over_pairs(batch: int, blocks: int, width: int) -> None:
    z = wave(batch, blocks, width).requires_grad_()
    again = z.detach().clone().requires_grad_()
    ours, truth = block_vicreg(z), reference.block_vicreg(again)
    for name, a, b in zip(("sim", "std", "cov"), ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, msg=name)
    weights = (25.0, 17.0, 1.3)
    sum(w * t for w, t in zip(weights, ours, strict=True)).backward()
    sum(w * t for w, t in zip(weights, truth, strict=True)).backward()
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-13)


def test_block_vicreg_in_fp32_survives_a_large_mean() -> None:
    """mean / sigma = 64: raw second moments in fp32 would be off by 9 % (the covariance of 16.9k rows)."""
    z = (torch.randn(4096, 2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 64).float()
    for ours, truth in zip(block_vicreg(z), reference.block_vicreg(z.double()), strict=True):
        assert ours.item() == pytest.approx(truth.item(), rel=1e-4)


def test_vicreg_properties() -> None:
    """Identical views have no invariance error; spread-out uncorrelated ones neither variance nor covariance error."""
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    z = 1.5 * hadamard[:, 1:, None].transpose(1, 2).expand(16, 4, 15)  # zero-mean orthogonal columns of std > 1
    sim, std, cov = block_vicreg(z)
    assert sim == 0 and std == 0 and cov == pytest.approx(0, abs=1e-24)
    collapsed = torch.ones(16, 4, 15, dtype=torch.float64)
    sim, std, cov = block_vicreg(collapsed)
    assert sim == 0 and cov == 0 and std == pytest.approx(1 - math.sqrt(1e-4))
    assert block_vicreg(z + 3)[1:] == pytest.approx((0, 0), abs=1e-20)  # a shift of all images changes nothing


@pytest.mark.parametrize(("batch", "width"), [(9, 12), (5, 33), (2, 1)])
def test_vicreg_equals_reference(batch: int, width: int) -> None:
    views = [wave(batch, width, phase=phase).requires_grad_() for phase in (0, 2)]
    again = [view.detach().clone().requires_grad_() for view in views]
    ours, truth = vicreg(*views), reference.vicreg(*again)
    for name, a, b in zip(("sim", "std", "cov"), ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, msg=name)
    (25 * ours[0] + 17 * ours[1] + 1.3 * ours[2]).backward()
    (25 * truth[0] + 17 * truth[1] + 1.3 * truth[2]).backward()
    for a, b in zip(views, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 4, 8), (8, 1, 8)])
def test_block_vicreg_refuses_what_has_no_statistics(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="at least 2"):
        block_vicreg(torch.zeros(shape))


def test_context_target_equals_reference() -> None:
    context, target = wave(9, 12).requires_grad_(), wave(9, 12, phase=2)
    again = context.detach().clone().requires_grad_()
    ours, truth = context_target_vicreg(context, target), reference.context_target_vicreg(again, target)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0)
    (ours[0] + 2 * ours[1] + 3 * ours[2]).backward()
    (truth[0] + 2 * truth[1] + 3 * truth[2]).backward()
    torch.testing.assert_close(context.grad, again.grad, rtol=1e-9, atol=1e-13)


def test_implementation_of_vicreg_is_passed_on() -> None:
    z = wave(9, 3, 12).float().to("cuda" if torch.cuda.is_available() else "cpu")
    pair = [z[:, 0], z[:, 1]]
    for loss, arguments in ((block_vicreg, [z]), (vicreg, pair), (context_target_vicreg, pair)):
        torch.testing.assert_close(loss(*arguments, impl="triton"), loss(*arguments), rtol=1e-5, atol=1e-7)
        with pytest.raises(UserError, match="unknown impl 'cuda'"):
            loss(*arguments, impl="cuda")


def test_projector_equals_reference() -> None:
    torch.manual_seed(0)
    projector = Projector(12, (24, 16, 20)).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    z = wave(6, 4, 12).requires_grad_()
    again = z.detach().clone().requires_grad_()
    ours = projector(z)
    truth = reference.projector(projector.state_dict(), again.flatten(0, 1)).unflatten(0, (6, 4))
    assert ours.shape == (6, 4, 20)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    ours.backward(wave(6, 4, 20, phase=1))
    truth.backward(wave(6, 4, 20, phase=1))
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-8, atol=1e-12)


def test_global_batch_norm_is_batch_norm() -> None:
    ours, theirs = GlobalBatchNorm(10).double(), torch.nn.BatchNorm1d(10).double().train()
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    torch.testing.assert_close(ours(wave(7, 10)), theirs(wave(7, 10)), rtol=1e-12, atol=1e-14)
