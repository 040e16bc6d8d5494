"""Foreign code, timed where it is installed: imported from its place, never copied.

`CheckoutNetworks` puts the networks of a checkout of facebookresearch/ijepa (CC BY-NC) into the loop of `eager`.
lightly and transformers have no equal of the whole step: `EncoderOnly` times their encoders alone.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.step.references import Batch, Drawn, Mark, Schedule, build_projector, no_mark, parameter_groups
from bench.step.references.eager import normalised
from cjepa_fast.config import Config, VitShape, encoder_shape


class _Foreign(nn.Module):
    """A network of the checkout under the calls of `eager`; parameters keep their names behind `inner.`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class _Encoder(_Foreign):
    def forward(self, images: Tensor, indices: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        assert valid is None, "its networks know no padding"
        return self.inner(images) if indices is None else self.inner(images, [indices])


class _Predictor(_Foreign):
    def forward(self, context: Tensor, indices: Tensor, targets: list[Tensor], valid: Tensor | None) -> Tensor:
        return self.inner(context, [indices], targets)


class CheckoutNetworks(nn.Module):
    """The networks of the checkout at `path`, for `eager.Trainer`.

    Raises RuntimeError that names what the checkout lacks.
    """

    def __init__(self, config: Config, path: str) -> None:
        super().__init__()
        source = Path(path) / "src/models/vision_transformer.py"
        if not source.is_file():
            raise RuntimeError(f"{source} is not there: pass a checkout of facebookresearch/ijepa")
        sys.path.insert(0, path)
        try:
            models: Any = importlib.import_module("src.models.vision_transformer")
        finally:
            sys.path.remove(path)
        model = config.model

        def encoder() -> nn.Module:
            return getattr(models, model.encoder)(img_size=[model.image_size], patch_size=model.patch_size)

        self.encoder, self.target_encoder = _Encoder(encoder()), _Encoder(encoder())
        self.predictor = _Predictor(
            models.vit_predictor(
                num_patches=(model.image_size // model.patch_size) ** 2, embed_dim=encoder_shape(model.encoder).width,
                predictor_embed_dim=model.predictor_width, depth=model.predictor_depth,
                num_heads=encoder_shape(model.encoder).heads,
            )
        )  # fmt: skip
        self.projector = build_projector(config, encoder_shape(config.model.encoder).width)
        self.target_encoder.requires_grad_(False)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of our networks."""
        foreign = ("encoder", "target_encoder", "predictor")

        def theirs(name: str) -> str:
            network, _, rest = name.partition(".")
            return f"{network}.inner.{rest}" if network in foreign else name

        return super().load_state_dict({theirs(name): value for name, value in state_dict.items()}, strict, assign)


def lightly_encoder(config: Config) -> nn.Module:
    """Return lightly's I-JEPA backbone, on torchvision's vision transformer."""
    from lightly.models.modules.ijepa import IJEPABackbone  # pyright: ignore[reportMissingImports]
    from torchvision.models.vision_transformer import VisionTransformer  # pyright: ignore[reportMissingImports]

    shape, model = encoder_shape(config.model.encoder), config.model
    network = VisionTransformer(
        image_size=model.image_size, patch_size=model.patch_size, num_layers=shape.depth, num_heads=shape.heads,
        hidden_dim=shape.width, mlp_dim=_hidden(shape),
    )  # fmt: skip
    return IJEPABackbone.from_vit(network)


def transformers_encoder(config: Config) -> nn.Module:
    """Return transformers' IJepaModel."""
    from transformers import IJepaConfig, IJepaModel  # pyright: ignore[reportMissingImports]

    shape, model = encoder_shape(config.model.encoder), config.model
    return IJepaModel(
        IJepaConfig(
            hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
            intermediate_size=_hidden(shape), image_size=model.image_size, patch_size=model.patch_size,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def _hidden(shape: VitShape) -> int:
    return round(shape.width * shape.mlp_ratio)


class EncoderOnly:
    """A step of an encoder alone: whole images without gradient, then forward, backward and AdamW.

    The trained pass sees the context where the encoder can drop patches (`masked`), else whole images. There is no
    predictor and no JEPA loss. This is less work than a step: a yardstick, not a rival.
    """

    def __init__(
        self, encoder: nn.Module, config: Config, device: torch.device, schedule: Schedule, *, masked: bool
    ) -> None:
        self.networks, self.config, self.device, self.masked = encoder.to(device).train(), config, device, masked
        self.half = config.model.precision == "bf16"
        self.optimizer = torch.optim.AdamW(parameter_groups(encoder), lr=schedule.lr)

    def batch(self, drawn: Drawn) -> Batch:
        context = drawn.masks.context.long().to(self.device) + 1  # behind the class token
        return normalised(drawn.images, self.config).to(self.device), context

    def _encode(self, images: Tensor, context: Tensor | None) -> Tensor:
        out: Any = self.networks(images) if context is None else self.networks(images, context)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        images, context = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                self._encode(images, None)
            mark("target")
            out = self._encode(images, context if self.masked else None)
            mark("context")
            loss = out.float().square().mean()
        mark("loss")
        loss.backward()
        mark("backward")
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        loss = self.gradients(batch, mark)
        self.update()
        mark("optimizer+EMA")
        return loss
