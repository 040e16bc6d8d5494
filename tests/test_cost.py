"""The cost model against the published table, the real modules and torch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast.config import Config, replace
from cjepa_fast.cost import gflop_per_image, memory_bytes, parameters, report
from cjepa_fast.errors import UserError
from cjepa_fast.losses import Projector
from cjepa_fast.presets import PRESETS
from cjepa_fast.vit import Encoder, Predictor, build_encoder, build_predictor, encoder_shape

SMALL, BASE, LARGE = (PRESETS[f"cjepa_vit_{name}16_in1k"] for name in ("small", "base", "large"))
HUGE = PRESETS["ijepa_vit_huge14_in1k"]


def networks(config: Config) -> tuple[Encoder, Predictor, Projector]:
    model, loss = config.model, config.loss
    encoder = build_encoder(model.encoder, model.image_size, model.patch_size)
    predictor = build_predictor(
        model.encoder,
        model.image_size,
        model.patch_size,
        model.predictor_depth,
        model.predictor_width,
        model.predictor_heads,
        targets_only=False,  # the model counts the method, without what ours leaves out
        shared_start=False,
    )
    width = encoder_shape(model.encoder).width
    return encoder, predictor, Projector(width, loss.projector_width or width, loss.projector_layers)


# mean tokens (context, target) and the GFLOP per image (context, target, predictor) that a hand count printed for
# them: a batch cut to its shortest context, and whole contexts
@pytest.mark.parametrize(
    ("config", "tokens", "printed"),
    [
        (SMALL, (50.2, 33.4), (6.7, 9.1, 22.2)),
        (BASE, (50.2, 33.4), (26.2, 34.9, 22.4)),
        (LARGE, (50.2, 33.4), (92.1, 122.5, 44.6)),
        (HUGE, (68.0, 44.4), (259.5, 333.2, 60.8)),
        (SMALL, (81.8, 33.4), (11.0, 9.1, 31.0)),
        (BASE, (81.8, 33.4), (42.8, 34.9, 31.2)),
        (LARGE, (81.8, 33.4), (150.7, 122.5, 62.2)),
        (HUGE, (109.8, 44.4), (421.1, 333.2, 84.8)),
    ],
)
def test_gflop_table(config: Config, tokens: tuple[float, float], printed: tuple[float, float, float]) -> None:
    cost = gflop_per_image(config, context_tokens=tokens[0], target_tokens=tokens[1])
    # half a unit of the last printed digit, and 0.2 % for attention at the mean instead of over the spread
    assert cost[:3] == pytest.approx(printed, rel=0.002 if tokens[0] > 80 else 1e-4, abs=0.051)


def test_gflop_agrees_with_torch() -> None:
    """What the modules do, counted by torch, is the model less the embedding of patches that the context drops."""
    config = replace(
        PRESETS["cifar10_tiny"], {"model.image_size": 24, "model.predictor_heads": 2, "mask.num_targets": 3}
    )
    encoder, predictor, projector = networks(config)
    images, kept, targets = torch.randn(2, 3, 24, 24), 13, 5
    context = torch.arange(kept).repeat(2, 1)
    target = torch.arange(targets).repeat(2, 3, 1)

    def counted(run: Callable[[], torch.Tensor], *, backward: bool) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = run()
            if backward:
                out.square().sum().backward()
        return counter.get_total_flops() / 2 / 1e9  # per image

    cost = gflop_per_image(config, context_tokens=kept, target_tokens=targets)
    dropped = 2 * 3 * 4 * 4 * 128 * (36 - kept) / 1e9
    hidden = torch.randn(2, kept, 128, requires_grad=True)
    means = torch.randn(2, 3, 128, requires_grad=True)
    assert counted(lambda: encoder(images, context), backward=True) == pytest.approx(cost.context - dropped)
    assert counted(lambda: encoder(images), backward=False) == pytest.approx(cost.target)
    assert counted(lambda: predictor(hidden, context, target), backward=True) == pytest.approx(cost.predictor)
    assert counted(lambda: projector(means), backward=True) == pytest.approx(cost.projector)

    pseudo_code = replace(config, {"loss.vicreg_views": "context_target"})
    assert gflop_per_image(pseudo_code, context_tokens=kept, target_tokens=targets).projector == pytest.approx(
        cost.projector * 2 / 3
    )


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # slow on the meta device
    config = replace(PRESETS[name], {"loss.projector_layers": 3, "loss.projector_width": 40})
    with torch.device("meta"):
        modules = networks(config)
    count = parameters(config)
    real = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in modules]
    assert [count.encoder, count.predictor] == real[:2]
    assert count.projector == (real[2] if config.loss.vicreg_weight else 0)
    assert count.trained == count.encoder + count.predictor + count.projector
    assert count.positions == modules[0].pos_embed.numel() + modules[1].predictor_pos_embed.numel()


def test_memory() -> None:
    """Activations, 34 D bytes per token and block: 35 + 37 GB for L at 512 images, 39 + 25 GB for H."""
    for config, batch, tokens, expected in (
        (LARGE, 512, (81.8, 33.4), 35e9 + 37e9),
        (HUGE, 256, (110.0, 44.4), 39e9 + 25e9),
    ):
        config = replace(config, {"optim.batch_size": batch})
        sizes = {"context_tokens": tokens[0], "target_tokens": tokens[1]}
        one = memory_bytes(config, world_size=1, **sizes)
        shape = encoder_shape(config.model.encoder)
        patches = (config.model.image_size // config.model.patch_size) ** 2
        rest = 34 * shape.width * patches * batch + 3 * batch * 3 * config.model.image_size**2
        assert one.activations - rest == pytest.approx(expected, rel=0.01)

        count = parameters(config)
        assert one.state == 16 * count.trained + 4 * count.encoder
        eight = memory_bytes(config, world_size=8, **sizes)
        assert eight.state == one.state / 8 and eight.activations == one.activations / 8
        assert eight.copies > one.copies > 2 * count.trained  # more blocks of the target at a time
        assert one.total == one.state + one.copies + one.activations

        halves = memory_bytes(replace(config, {"runtime.accumulate": 2}), world_size=1, **sizes)
        assert 0.5 < halves.activations / one.activations < 0.51
        fp32 = memory_bytes(replace(config, {"model.precision": "fp32"}), world_size=1, **sizes)
        assert fp32.copies == 0 and 1.9 < fp32.activations / one.activations < 2


def test_report() -> None:
    text = report(BASE, 1_281_167, 16, 81.8, 33.4)
    assert len(text.splitlines()) == 12
    for part in (
        "context encoder     85,646,592        42.754",
        "total trained       98,066,688       108.926",
        "196 per image, 81.8 in the context, 4 x 33.4 targets",
        "375,000 of 2048 images (16 x 128), 625 per epoch, 600 epochs, warm-up 9,375",
        "223 TFLOP per step, 83.7 EFLOP in all",
        "GiB per process: state 0.1",
    ):
        assert part in text, (part, text)
    with pytest.raises(UserError, match=r"^optim\.batch_size: 2048 exceeds the 2047 training images"):
        report(BASE, 2047, 16, 81.8, 33.4)
