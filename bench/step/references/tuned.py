"""The same mathematics as a strong engineer would write it today, without own kernels.

Fused attention of torch, torch.compile around whole networks, patches gathered before their product, statistics in one
pass, fused AdamW, averages in a few launches, no wait for the device. Activations are bf16. Weights are fp32 and cast
where they are used, as FSDP2's MixedPrecisionPolicy does: autocast would keep the residual stream in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step.references import (
    Batch,
    Drawn,
    Mark,
    Schedule,
    build_projector,
    loss_weights,
    no_mark,
    padded,
    parameter_groups,
)
from bench.step.references.eager import one_pass
from cjepa_fast.config import Config, VitShape, encoder_shape
from cjepa_fast.networks.precision import LayerNorm
from cjepa_fast.networks.sequences import take_rows
from cjepa_fast.networks.vit import sincos_positions


class Linear(nn.Linear):
    """torch's linear layer, over weights cast where they are used."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Attention(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv, self.proj = Linear(shape.width, 3 * shape.width), Linear(shape.width, shape.width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        hidden = round(shape.width * shape.mlp_ratio)
        self.fc1, self.fc2 = Linear(shape.width, hidden), Linear(hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(shape.width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(shape), Mlp(shape)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)  # for the layout of its weights


class Encoder(nn.Module):
    """Bytes [B, H, W, 3] and kept patches [B, K] (None: all) -> [B, K, D]."""

    mean: Tensor
    std: Tensor
    pos_embed: Tensor

    def __init__(self, shape: VitShape, config: Config) -> None:
        super().__init__()
        self.side, self.patch_size = config.model.image_size // config.model.patch_size, config.model.patch_size
        self.dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
        self.register_buffer("pos_embed", sincos_positions(shape.width, (self.side, self.side)))
        self.register_buffer("mean", torch.tensor(config.data.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.data.std), persistent=False)
        self.patch_embed = PatchEmbed(self.patch_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = LayerNorm(shape.width, eps=1e-6)

    def forward(self, images: Tensor, indices: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        side, size, proj = self.side, self.patch_size, self.patch_embed.proj
        patches = images.view(-1, side, size, side, size, 3).transpose(2, 3).reshape(-1, side * side, size * size, 3)
        positions = self.pos_embed
        if indices is not None:
            patches, positions = take_rows(patches, indices), positions[0][indices]
        pixels = ((patches.float() / 255 - self.mean) / self.std).flatten(2).to(self.dtype)
        assert proj.bias is not None
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1).to(self.dtype)
        x = (F.linear(pixels, weight) + (proj.bias + positions)).to(self.dtype)
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x)


class Predictor(nn.Module):
    """Context [B, Kc, D] and targets [B, M, Kt] -> [B, M, Kt, D]."""

    predictor_pos_embed: Tensor

    def __init__(self, shape: VitShape, encoder_width: int, side: int) -> None:
        super().__init__()
        self.predictor_embed = Linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_buffer("predictor_pos_embed", sincos_positions(shape.width, (side, side)))
        self.predictor_blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.predictor_norm = LayerNorm(shape.width, eps=1e-6)
        self.predictor_proj = Linear(shape.width, encoder_width)

    def forward(self, context: Tensor, indices: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
        positions, kept, blocks = self.predictor_pos_embed[0], context.shape[1], targets.shape[1]
        x = (self.predictor_embed(context) + positions[indices]).to(context.dtype)
        tokens = (self.mask_token + positions[targets]).to(context.dtype)
        x = torch.cat([x[:, None].expand(-1, blocks, -1, -1), tokens], dim=2).flatten(0, 1)
        seen = None
        if valid is not None:
            seen = torch.cat([valid[:, None].expand(-1, blocks, -1), valid.new_ones(targets.shape)], dim=2)
            seen = seen.flatten(0, 1)[:, None, None]
        for block in self.predictor_blocks:
            x = block(x, seen)
        return self.predictor_proj(self.predictor_norm(x[:, kept:])).unflatten(0, targets.shape[:2])


class Networks(nn.Module):
    """The four networks of `config`, for weights from a state dict."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, shape = config.model, encoder_shape(config.model.encoder)
        narrow = VitShape(model.predictor_width, model.predictor_depth, shape.heads)
        self.encoder, self.target_encoder = (Encoder(shape, config) for _ in range(2))
        self.predictor = Predictor(narrow, shape.width, model.image_size // model.patch_size)
        self.projector = build_projector(config, shape.width)
        self.target_encoder.requires_grad_(False)


class Trainer:
    """See `bench.step.references.Trainer`. `compile`: None, or a mode of torch.compile."""

    def __init__(
        self, networks: Networks, config: Config, device: torch.device, schedule: Schedule, *, compile: str | None
    ) -> None:
        self.networks, self.device, self.schedule = networks, device, schedule
        self.weights = loss_weights(config)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(networks), lr=schedule.lr, betas=schedule.betas, eps=schedule.eps,
            fused=True,
        )  # fmt: skip

        def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return function if compile is None else torch.compile(function, mode=compile, dynamic=False)

        self.encode_target, self.encode = wrap(networks.target_encoder), wrap(networks.encoder)
        self.predict, self.loss = wrap(networks.predictor), wrap(self._loss)

    def batch(self, drawn: Drawn) -> Batch:
        context, valid = padded(drawn.masks)
        valid = None if valid is None else valid.to(self.device)
        return drawn.images.to(self.device), context.to(self.device), valid, drawn.masks.target.long().to(self.device)

    def _loss(self, predicted: Tensor, actual: Tensor, targets: Tensor) -> Tensor:
        chosen = take_rows(actual, targets.flatten(1)).float().view(predicted.shape)
        loss = F.smooth_l1_loss(predicted.float(), F.layer_norm(chosen, chosen.shape[-1:]))
        if self.networks.projector is not None:
            means = predicted.float().mean(dim=2)
            z = self.networks.projector(means.flatten(0, 1)).unflatten(0, means.shape[:2])
            loss = loss + one_pass(z, self.weights)
        return loss

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        images, context, valid, targets = batch
        with torch.no_grad():
            actual = self.encode_target(images)
        mark("target")
        embedded = self.encode(images, context, None if valid is None else valid[:, None, None])
        mark("context")
        predicted = self.predict(embedded, context, targets, valid)
        mark("predictor")
        loss = self.loss(predicted, actual, targets)
        mark("loss")
        loss.backward()
        mark("backward")
        return loss.detach()

    def update(self) -> None:
        schedule, networks = self.schedule, self.networks
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.lr
            group["weight_decay"] = schedule.weight_decay if group["decayed"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(networks.target_encoder.parameters()), list(networks.encoder.parameters()), 1 - schedule.ema
            )

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        loss = self.gradients(batch, mark)
        self.update()
        mark("optimizer+EMA")
        return loss
