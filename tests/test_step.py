"""The step against the reference step: same numbers, whatever the micro-batches or the runtime choices."""

from __future__ import annotations

import copy

import pytest
import torch

from cjepa_fast import reference
from cjepa_fast.losses import Projector
from cjepa_fast.masks import MultiBlockSampler
from cjepa_fast.optim import AdamW, parameter_groups, schedules
from cjepa_fast.step import LossWeights, Networks, forward_backward, target_embeddings
from cjepa_fast.vit import IMAGENET_MEAN, IMAGENET_STD, Encoder, Predictor, VitShape

SHAPE, NARROW, SIZE, PATCH, BATCH = VitShape(32, 2, 2), VitShape(16, 2, 2), 24, 4, 8
WEIGHTS = LossWeights("smooth_l1", 2.5, 2.5, 0.1)


def networks(*, projector: bool = True, dtype: torch.dtype = torch.float32) -> Networks:
    torch.manual_seed(0)
    encoder, target_encoder = (Encoder(SHAPE, SIZE, PATCH, dtype=dtype) for _ in range(2))
    predictor = Predictor(NARROW, SHAPE.width, encoder.grid)
    return Networks(encoder, predictor, target_encoder, Projector(SHAPE.width, 24, 2) if projector else None).to(dtype)


def batch(step: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.randint(
        0, 256, (size, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
    )
    masks = MultiBlockSampler(SIZE // PATCH, min_keep=3).sample(step, torch.arange(size))
    return images, masks.context, masks.target


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_ten_steps_equal_the_reference(impl: str) -> None:
    """The whole method from the papers' formulas, optimizer and EMA included, in fp64: only rounding differs."""
    ours = networks()
    truth = {name: value.detach().clone().double() for name, value in ours.state_dict().items()}
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    moments = {name: (torch.zeros_like(truth[name]), torch.zeros_like(truth[name])) for name in trained}
    plan = schedules(10, 3, lr=1e-3, start_lr=1e-4, final_lr=1e-5, weight_decay=0.04, final_weight_decay=0.4, ema=0.9)
    optimizer = AdamW(parameter_groups(ours), averages=ours.averages(), impl=impl)
    mean, std = (torch.tensor(values).double() for values in (IMAGENET_MEAN, IMAGENET_STD))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in truth.items() if name.startswith(prefix)}

    for step in range(10):
        images, context, target = batch(step)
        out = forward_backward(ours, images, context, target, WEIGHTS)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr[step]
            group["weight_decay"] = plan.weight_decay[step] if group["decayed"] else 0.0
        optimizer.step(momentum=plan.ema[step])
        optimizer.zero_grad()

        leaves = {name: truth[name].requires_grad_() for name in trained}
        loss = reference.cjepa_loss(
            ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2), context.long(), target.long(),
            context_encoder=lambda x, i: reference.encoder(part("encoder."), x, i, SHAPE.heads),
            target_encoder=lambda x, i: reference.encoder(part("target_encoder."), x, i, SHAPE.heads),
            predict=lambda z, c, t: reference.predictor(part("predictor."), z, c, t, NARROW.heads),
            project=lambda z: reference.projector(part("projector."), z), weights=WEIGHTS[1:4],
        )  # fmt: skip
        assert out.terms.loss.item() == pytest.approx(loss.item(), rel=1e-6), f"step {step}"
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            decay = plan.weight_decay[step] if truth[name].ndim > 1 else 0.0
            truth[name], moments[name] = reference.adamw(
                truth[name].detach(), grad, moments[name], step + 1, lr=plan.lr[step], weight_decay=decay
            )
        for name in part("encoder."):
            key = f"target_encoder.{name}"
            truth[key] = reference.ema(truth[key], truth[f"encoder.{name}"], plan.ema[step])
    for name, value in ours.state_dict().items():
        error = (value - truth[name]).norm() / truth[name].norm()
        assert error < 2e-4, f"{name}: relative error {error:.1e} after ten steps"


@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_exact(views: str, projector: bool, accumulate: int) -> None:
    """Batch statistics span the micro-batches: loss, terms and gradients are those of the undivided batch."""
    whole, parts = (networks(projector=projector, dtype=torch.float64) for _ in range(2))
    weights = WEIGHTS._replace(views=views)
    images, context, target = batch(0)
    a = forward_backward(whole, images, context, target, weights)
    b = forward_backward(parts, images, context, target, weights, accumulate)
    torch.testing.assert_close(torch.stack(b.terms).double(), torch.stack(a.terms).double(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b.predictions, a.predictions)
    for (name, p), (_, q) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_plain_ijepa_has_no_vicreg_terms() -> None:
    net = networks(projector=False)
    terms = forward_backward(net, *batch(0), WEIGHTS).terms
    assert terms.loss == terms.prediction and terms.sim == terms.std == terms.cov == 0


def test_target_encoder_is_a_copy_that_gets_no_gradient() -> None:
    net = networks()
    for (name, a), (_, b) in zip(net.encoder.named_parameters(), net.target_encoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    forward_backward(net, *batch(0), WEIGHTS)
    assert all(p.grad is None and not p.requires_grad for p in net.target_encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.parameters())
    assert not target_embeddings(net.target_encoder, batch(0)[0]).requires_grad


def test_averages_follow_the_encoder() -> None:
    net = networks()
    with torch.no_grad():
        for parameter in net.encoder.parameters():
            parameter.add_(torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    before = copy.deepcopy(dict(net.target_encoder.named_parameters()))
    AdamW(parameter_groups(net), averages=net.averages()).step(momentum=0.75)
    for (name, after), parameter in zip(net.target_encoder.named_parameters(), net.encoder.parameters(), strict=True):
        torch.testing.assert_close(after, reference.ema(before[name], parameter, 0.75), rtol=1e-6, atol=1e-7, msg=name)


def test_compiled_blocks_compute_the_same() -> None:
    eager, compiled = networks(), networks()
    for block in compiled.predictor.predictor_blocks:  # one shape: every further one costs the C++ compiler seconds
        block.compile(dynamic=False, fullgraph=True)
    images, context, target = batch(0)
    a = forward_backward(eager, images, context, target, WEIGHTS)
    b = forward_backward(compiled, images, context, target, WEIGHTS)
    assert b.terms.loss.item() == pytest.approx(a.terms.loss.item(), rel=1e-5)
    for (name, p), (_, q) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
