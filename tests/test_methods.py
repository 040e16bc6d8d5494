"""Methods behind one protocol: the table, and VICReg on two views against its plain truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cjepa_fast import reference
from cjepa_fast.config import Config, replace
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.methods import METHODS, Method, build_method
from cjepa_fast.networks import Encoder
from cjepa_fast.networks.vit import IMAGENET_MEAN, IMAGENET_STD
from cjepa_fast.train import main
from masking import make
from runs import metrics, without_clocks, write_images

IMAGES, SIDE = 8, 24
SMALL: dict[str, Any] = {
    "model.encoder": "vit_demo", "model.image_size": SIDE, "model.patch_size": 4, "model.predictor_depth": 1,
    "model.predictor_width": 48, "model.precision": "fp32", "loss.projector": (40, 24), "runtime.kernels": "eager",
    "optim.batch_size": IMAGES, "data.mean": IMAGENET_MEAN, "data.std": IMAGENET_STD,
}  # fmt: skip


def configure(method: str) -> Config:
    changes = {"method": method, "data.augment": "color" if method == "vicreg" else "none"}
    return replace(PRESETS["cjepa_vit_tiny16_in1k"], SMALL | changes)


def doubled(c: Config) -> Method:
    """The method in fp64, activations too."""
    torch.manual_seed(0)
    method = build_method(c).double()
    for network in method.children():
        if isinstance(network, Encoder):
            network.dtype = torch.float64
    return method


def images(views: int) -> torch.Tensor:
    shape = (views, IMAGES, SIDE, SIDE, 3) if views > 1 else (IMAGES, SIDE, SIDE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def parts(method: Method, number: int) -> list[Any]:
    if not method.masked:
        return [None] * number
    return make("fixed", SIDE // 4, min_keep=3).sample_parts(
        0, range(IMAGES), number, union=not method.needs_all_targets
    )


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_are_exact(name: str) -> None:
    """Loss, terms and gradients of four micro-batches are those of the undivided batch."""
    whole, divided = (doubled(configure(name)) for _ in range(2))
    one = forward_backward(whole, images(whole.views), parts(whole, 1))
    four = forward_backward(divided, images(divided.views), parts(divided, 4))
    assert one.terms.shape == (len(whole.local_terms) + len(whole.batch_terms),)
    torch.testing.assert_close(four.loss.double(), one.loss.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(four.terms.double(), one.terms.double(), rtol=1e-6, atol=1e-12)
    for (parameter, p), (_, q) in zip(whole.named_parameters(), divided.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), parameter
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9, msg=parameter)


def test_vicreg_is_the_papers_loss() -> None:
    """Loss and gradients in fp64 against the plain encoder, expander and VICReg of the reference."""
    method = doubled(configure("vicreg"))
    pixels = images(2)
    out = forward_backward(method, pixels, [None])

    state = {name: value.detach().clone().double() for name, value in method.state_dict().items()}
    leaves = {name: state[name].requires_grad_() for name, p in method.named_parameters() if p.requires_grad}
    mean, std = (torch.tensor(values).double() for values in (IMAGENET_MEAN, IMAGENET_STD))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    normalised = ((pixels.double() / 255 - mean) / std).permute(0, 1, 4, 2, 3).flatten(0, 1)
    means = reference.encoder(part("encoder."), normalised, None, 4).mean(dim=1)
    x, y = means.chunk(2)
    expanded = reference.projector(part("projector."), torch.stack([x, y], dim=1).flatten(0, 1)).unflatten(0, (-1, 2))
    sim, std_term, cov = reference.vicreg(expanded[:, 0], expanded[:, 1])
    loss = 25 * sim + 25 * std_term + cov
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(out.terms.double(), torch.stack([sim, std_term, cov]).detach(), rtol=1e-6, atol=1e-12)
    for (name, _), grad in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(method.get_parameter(name).grad, grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_every_method_resumes_to_the_bit(name: str, cache: None, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_images(data, 12, ("cat", "dog"))
    arguments = (
        f"--method {name} --model.encoder vit_demo --model.image-size 24 --model.patch-size 4 "
        "--model.predictor-depth 1 --model.predictor-width 48 --mask.target-scale 0.15 0.2 --mask.min-keep 3 "
        "--mask.context-keep None --loss.projector 32 32 --optim.batch-size 8 --optim.steps 6 "
        "--optim.warmup-epochs 0.3 --run.log-every 1 --run.checkpoint-every 3 --runtime.data-threads 1 "
        f"--data.augment {'color' if name == 'vicreg' else 'none'} --data.root {data} --run.dir {tmp_path / 'run'}"
    ).split()  # fmt: skip
    assert main(arguments) == 0
    straight = metrics(tmp_path / "run")
    method = build_method(configure(name))
    terms = {f"loss_{term}" for term in (*method.local_terms, *method.batch_terms)}
    assert all({"loss", "feature_std", "rankme", *terms} <= line.keys() for line in straight)
    assert ("cosine_gap" in straight[0]) == method.masked and "knn_top1" in straight[-1]
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert without_clocks(metrics(tmp_path / "run")) == without_clocks(straight)
