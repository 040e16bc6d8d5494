"""The optimizer step with its averages, for the parameters of an encoder and its predictor.

fp32 parameters, gradients, moments and averages: AdamW reads four numbers per parameter and writes three (28 bytes);
the average of an encoder's parameter is read and written (8 bytes). The predictor has no average. Every variant owns
its tensors, which start equal; after the first step they are compared.

Not captured in CUDA graphs: how often the host must launch is part of the matter, see the column of its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.ops.cases import UNINTERPRETED, Case, Variant
from cjepa_fast.engine.optim import AdamW
from cjepa_fast.networks.vit import build_encoder, build_predictor

DTYPE = "fp32"
# encoder, patch size, depth of its predictor
SHAPES = [("vit_huge", 14, 12), ("vit_large", 16, 12), ("vit_base", 16, 6), ("vit_small", 16, 6)]
MOMENTUM = 0.996
# a step that does not drown in the parameters' own size, so that a wrong one shows
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}

Build = Callable[[list[nn.Parameter], list[Tensor]], Callable[[], Any]]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.04},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def ours(parameters: list[nn.Parameter], averages: list[Tensor]) -> Callable[[], Any]:
    twins: dict[Tensor, Tensor] = dict(zip(parameters, averages, strict=False))
    optimizer = AdamW(groups_of(parameters), **HYPERPARAMETERS, averages=twins, impl="triton")
    return functools.partial(optimizer.step, momentum=MOMENTUM)


def torch_step(move: Callable[[list[Tensor], list[Tensor]], Any], **kind: Any) -> Build:
    """torch's AdamW of some kind, and then `move` for the averages and the parameters that they follow."""

    def build(parameters: list[nn.Parameter], averages: list[Tensor]) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(groups_of(parameters), **HYPERPARAMETERS, **kind)
        followed = [parameter.detach() for parameter in parameters[: len(averages)]]

        def step() -> None:
            optimizer.step()
            move(averages, followed)

        return step

    return build


def lerp(averages: list[Tensor], followed: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, followed, 1 - MOMENTUM)


def multiply_and_add(averages: list[Tensor], followed: list[Tensor]) -> None:
    torch._foreach_mul_(averages, MOMENTUM)
    torch._foreach_add_(averages, followed, alpha=1 - MOMENTUM)


def loop(averages: list[Tensor], followed: list[Tensor]) -> None:
    for average, parameter in zip(averages, followed, strict=True):
        average.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * parameter)


BUILDS: dict[str, Build] = {
    "triton": ours,
    "fused + foreach lerp": torch_step(lerp, fused=True),
    "foreach + foreach mul, add": torch_step(multiply_and_add, foreach=True),
    "foreach + loop over tensors": torch_step(loop, foreach=True),  # the published code
    "loop + loop": torch_step(loop, foreach=False),
}


class Trainee:
    """Parameters with gradients, averages of the first of them, and the step that moves all; made at the first step."""

    def __init__(self, shapes: list[torch.Size], averaged: int, device: str, build: Build) -> None:
        self.arguments = (shapes, averaged, device, build)
        self.step: Callable[[], Any] | None = None
        self.moved: list[Tensor] = []

    def make(self, shapes: list[torch.Size], averaged: int, device: str, build: Build) -> Callable[[], Any]:
        random = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
        parameters = [nn.Parameter(random(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = random(parameter.shape)
        averages = [random(shape) for shape in shapes[:averaged]]
        self.moved = [*parameters, *averages]
        return build(parameters, averages)

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        self.step = self.step or self.make(*self.arguments)
        self.step()
        return self.moved


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for name, patch_size, depth in SHAPES if device == "cuda" else SHAPES[-1:]:
        with torch.device("meta"):
            encoder = build_encoder("vit_pico" if quick else name, 224, patch_size)
            predictor = build_predictor("vit_pico" if quick else name, 224, patch_size, 2 if quick else depth)
        shapes = [[p.shape for p in network.parameters() if p.requires_grad] for network in (encoder, predictor)]
        followed, total = (sum(map(torch.Size.numel, part)) for part in (shapes[0], [*shapes[0], *shapes[1]]))
        make = functools.partial(Trainee, [*shapes[0], *shapes[1]], len(shapes[0]), device)
        size = 28 * total + 8 * followed
        yield Case(
            name=f"{'pico' if quick else name.removeprefix('vit_')} {total / 1e6:.0f}M parameters, "
                 f"{size / total:.1f} B each",
            direction="", inputs=tuple, bytes=size, truth=make(BUILDS["loop + loop"]), error_limit=1e-5,
            variants=[
                Variant(
                    name=variant, call=make(build), role="ours" if build is ours else "rival", timed="queue",
                    obstacle=UNINTERPRETED if build is ours and device == "cpu" else None,
                )
                for variant, build in BUILDS.items()
            ],
        )  # fmt: skip
