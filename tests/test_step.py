"""The step against the reference step: same numbers, whatever the micro-batches or the runtime choices."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import reference
from cjepa_fast.config import OptimConfig, VitShape
from cjepa_fast.engine.optim import AdamW, parameter_groups
from cjepa_fast.engine.schedules import Length, schedules
from cjepa_fast.engine.step import StepOutput, forward_backward
from cjepa_fast.masks import Masks
from cjepa_fast.methods.jepa import Jepa, Regularisation, target_embeddings
from cjepa_fast.networks import Encoder, Predictor
from cjepa_fast.networks.heads import Projector
from cjepa_fast.networks.vit import IMAGENET_MEAN, IMAGENET_STD
from masking import make

SHAPE, NARROW, SIZE, PATCH, BATCH = VitShape(32, 2, 2), VitShape(16, 2, 2), 24, 4, 8
WEIGHTS = (2.5, 2.5, 0.1)  # of sim, std and cov


def networks(
    *, projector: bool = True, dtype: torch.dtype = torch.float32, views: str = "target_blocks",
    recoloured: bool = False, **options: bool,
) -> Jepa:  # fmt: skip
    """I-JEPA, or with a projector C-JEPA."""
    torch.manual_seed(0)
    encoder, target_encoder = (Encoder(SHAPE, SIZE, PATCH, dtype=dtype) for _ in range(2))
    predictor = Predictor(NARROW, SHAPE.width, encoder.grid, **options)
    head = (Projector(SHAPE.width, (24, 24)), Regularisation(WEIGHTS, views)) if projector else (None, None)
    method = Jepa(
        encoder, predictor, target_encoder, *head, prediction="smooth_l1", recoloured=recoloured, kernels="auto"
    )
    return method.to(dtype)


def whole_targets(net: Jepa, images: torch.Tensor) -> torch.Tensor:
    """The target encoder's output for all patches."""
    with torch.no_grad():
        return target_embeddings(net.target_encoder, images)


def batch(
    step: int, size: int = BATCH, *, parts: int = 1, rank: int = 0, ranks: int = 1, union: bool = True,
    mode: str = "fixed",
) -> tuple[torch.Tensor, list[Masks]]:  # fmt: skip
    """A rank's images of a step and their masks, in micro-batches; `size` images on all ranks."""
    images = torch.randint(
        0, 256, (size, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
    )
    ids = torch.arange(size).chunk(ranks)[rank]
    sampler = make(mode, SIZE // PATCH, min_keep=3)
    return images.chunk(ranks)[rank], sampler.sample_parts(step, ids, parts, union=union)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_ten_steps_equal_the_reference(impl: str) -> None:
    """The whole method from the papers' formulas, optimizer and EMA included, in fp64: only rounding differs."""
    ours = networks()
    truth = {name: value.detach().clone().double() for name, value in ours.state_dict().items()}
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    moments = {name: (torch.zeros_like(truth[name]), torch.zeros_like(truth[name])) for name in trained}
    plan = schedules(OptimConfig(final_lr=1e-5, ema=0.9), Length(10, 10, 3))
    optimizer = AdamW(parameter_groups(ours), averages=ours.averages(), impl=impl)
    mean, std = (torch.tensor(values).double() for values in (IMAGENET_MEAN, IMAGENET_STD))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in truth.items() if name.startswith(prefix)}

    for step in range(10):
        images, masks = batch(step)
        out = forward_backward(ours, images, masks)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr[step]
            group["weight_decay"] = plan.weight_decay[step] if group["decayed"] else 0.0
        optimizer.step(momentum=plan.ema[step])
        optimizer.zero_grad()

        leaves = {name: truth[name].requires_grad_() for name in trained}
        loss = reference.cjepa_loss(
            ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2), masks[0].context.long(), masks[0].target.long(),
            context_encoder=lambda x, i: reference.encoder(part("encoder."), x, i, SHAPE.heads),
            target_encoder=lambda x, i: reference.encoder(part("target_encoder."), x, i, SHAPE.heads),
            predict=lambda z, c, t: reference.predictor(part("predictor."), z, c, t, NARROW.heads),
            project=lambda z: reference.projector(part("projector."), z), weights=WEIGHTS,
        )  # fmt: skip
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6), f"step {step}"
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


def same_step(a: Jepa, b: Jepa, one: StepOutput, other: StepOutput) -> None:
    """Terms, predictions and gradients agree up to fp64 rounding."""
    torch.testing.assert_close(other.loss.double(), one.loss.double(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.terms.double(), one.terms.double(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.predictions, one.predictions)
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["fixed", "faithful", "packed"])
@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_exact(mode: str, views: str, projector: bool, parts: int) -> None:
    """Batch statistics span the micro-batches: loss, terms and gradients are those of the undivided batch."""
    whole, divided = (networks(projector=projector, dtype=torch.float64, views=views) for _ in range(2))
    union = views == "target_blocks"
    a = forward_backward(whole, *batch(0, mode=mode, union=union))
    b = forward_backward(divided, *batch(0, mode=mode, union=union, parts=parts))
    same_step(whole, divided, a, b)


@pytest.mark.parametrize("mode", ["fixed", "packed"])
@pytest.mark.parametrize("shared_context", [False, True])
def test_unions_change_nothing(shared_context: bool, mode: str) -> None:
    """Terms, predictions and gradients stay if the target encoder computes target tokens alone."""
    plain, ours = (networks(dtype=torch.float64, shared_context=shared_context) for _ in range(2))
    a = forward_backward(plain, *batch(0, mode=mode, union=False))
    b = forward_backward(ours, *batch(0, mode=mode, union=True))
    assert a.embeddings is not None and b.embeddings is None
    same_step(plain, ours, a, b)


def test_unions_save_work() -> None:
    """FLOP of a step as torch counts them, against what the last block of the target encoder leaves out, by hand."""
    images, masks = batch(0, union=True)
    (width, _, _, ratio), patches = SHAPE, (SIZE // PATCH) ** 2

    def counted(union: bool) -> int:
        net = networks(projector=False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            forward_backward(net, images, batch(0, union=union)[1])
        return counter.get_total_flops()

    # queries, projection and MLP of all other tokens, and the attention of their queries
    expected = (BATCH * patches - len(masks[0].union)) * 2 * (2 + 2 * ratio) * width**2
    expected += (BATCH * patches - int(masks[0].union_offsets[-1])) * 4 * patches * width
    assert counted(False) - counted(True) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("mode", ["fixed", "packed"])
@pytest.mark.parametrize("parts", [1, 2])
def test_padding_is_not_missed(mode: str, parts: int) -> None:
    padded, trimmed = (networks(dtype=torch.float64) for _ in range(2))
    images, masks = batch(0, mode=mode, union=True, parts=parts)
    shorter = [part.trimmed() for part in masks]
    assert all(len(b.union) < len(a.union) for a, b in zip(masks, shorter, strict=True))
    if mode == "packed":
        assert all(len(b.context) == len(b.image_of) < len(a.context) for a, b in zip(masks, shorter, strict=True))
    outs = (forward_backward(net, images, m) for net, m in ((padded, masks), (trimmed, shorter)))
    same_step(padded, trimmed, *outs)


@pytest.mark.parametrize("shared_context", [False, True])
def test_packed_contexts(shared_context: bool) -> None:
    """Contexts of all lengths in one batch: the loss is the mean of the reference's for each image alone."""
    ours = networks(projector=False, dtype=torch.float64, shared_context=shared_context)
    images, (masks,) = batch(3, mode="packed")
    assert len(set(masks.offsets.diff().tolist())) > 3
    out = forward_backward(ours, images, [masks])
    state = {name: value.detach().double() for name, value in ours.state_dict().items()}

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    mean, std = (torch.tensor(values).double() for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    losses = []
    for image, (start, end) in enumerate(itertools.pairwise(masks.offsets.tolist())):
        alone, context = pixels[image : image + 1], masks.context[None, start:end].long()
        target = masks.target[image : image + 1].long()
        encoded = reference.encoder(part("encoder."), alone, context, SHAPE.heads)
        predicted = reference.predictor(
            part("predictor."), encoded, context, target, NARROW.heads, shared_context=shared_context
        )
        targets = reference.encoder(part("target_encoder."), alone, None, SHAPE.heads)
        torch.testing.assert_close(out.predictions[image], predicted[0])
        losses.append(reference.prediction_loss(predicted, targets, target))
    torch.testing.assert_close(out.terms[0].double(), torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_two_views() -> None:
    """The student sees the first, the target encoder the second."""
    (first, masks), (second, _) = batch(0), batch(1)
    ours, theirs = networks(recoloured=True), networks(recoloured=True)
    assert ours.views == 2
    out = forward_backward(ours, torch.stack([first, second]), masks)
    alike = forward_backward(theirs, torch.stack([first, first]), masks)
    assert torch.equal(out.predictions, alike.predictions) and out.loss != alike.loss
    full = [masks[0]._replace(union=None, union_offsets=None, target_slot=None)]
    whole = forward_backward(ours, torch.stack([first, second]), full)
    assert whole.embeddings is not None and torch.equal(whole.embeddings, whole_targets(ours, second))
    assert torch.equal(forward_backward(theirs, first, masks).loss, alike.loss)


def test_plain_ijepa_has_no_vicreg_terms() -> None:
    net = networks(projector=False)
    out = forward_backward(net, *batch(0))
    assert net.local_terms == ("prediction",) and net.batch_terms == ()
    assert out.terms.shape == (1,) and out.loss == out.terms[0]


def test_target_encoder_is_a_copy_that_gets_no_gradient() -> None:
    net = networks()
    for (name, a), (_, b) in zip(net.encoder.named_parameters(), net.target_encoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    forward_backward(net, *batch(0))
    assert all(p.grad is None and not p.requires_grad for p in net.target_encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder.parameters())
    assert not whole_targets(net, batch(0)[0]).requires_grad


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
    a = forward_backward(eager, *batch(0))
    b = forward_backward(compiled, *batch(0))
    assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)
    for (name, p), (_, q) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
