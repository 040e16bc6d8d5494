"""The step of the published I-JEPA trainer, costly habits included, with C-JEPA's Algorithm 1 as printed.

Each habit has a switch: the waterfall of `bench.step` drops one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import math

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
from cjepa_fast.config import Config, VitShape, encoder_shape
from cjepa_fast.networks.vit import sincos_positions


class Attention(nn.Module):
    """Softmax over a matrix of all scores. The matrix is returned, too, and dropped by the caller."""

    def __init__(self, shape: VitShape, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.sdpa = shape.heads, sdpa
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        images, tokens, width = x.shape
        split = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]  # three full-size gradients, each zero but for its part
        seen = None if valid is None else valid[:, None, None, :]
        weights = None
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        else:
            scores = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
            if seen is not None:
                scores = scores.masked_fill(~seen, -math.inf)
            weights = scores.softmax(dim=-1)
            mixed = weights @ value
        return self.proj(mixed.transpose(1, 2).reshape(images, tokens, width)), weights


class Mlp(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        hidden = round(shape.width * shape.mlp_ratio)
        self.fc1, self.act, self.fc2 = nn.Linear(shape.width, hidden), nn.GELU(), nn.Linear(hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, shape: VitShape, sdpa: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(shape.width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(shape, sdpa), Mlp(shape)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        mixed, _ = self.attn(self.norm1(x), valid)
        x = x + mixed
        return x + self.mlp(self.norm2(x))


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Gather rows of each image with an int64 index expanded to every element: [B, N, C] -> [B, K, C]."""
    return torch.gather(x, 1, indices.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """images [B, 3, H, W], normalised; every patch is embedded, then those in `indices` [B, K] are kept."""

    pos_embed: Tensor

    def __init__(self, shape: VitShape, image_size: int, patch_size: int, sdpa: bool) -> None:
        super().__init__()
        side = image_size // patch_size
        self.register_buffer("pos_embed", sincos_positions(shape.width, (side, side)))
        self.patch_embed = PatchEmbed(patch_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, sdpa) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(self, images: Tensor, indices: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if indices is not None:
            x = take(x, indices)
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)


class Predictor(nn.Module):
    """Context [B, Kc, D] and M target index tensors [B, Kt] -> [M * B, Kt, D], block after block."""

    predictor_pos_embed: Tensor

    def __init__(self, shape: VitShape, encoder_width: int, side: int, sdpa: bool) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_buffer("predictor_pos_embed", sincos_positions(shape.width, (side, side)))
        self.predictor_blocks = nn.ModuleList(Block(shape, sdpa) for _ in range(shape.depth))
        self.predictor_norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.predictor_proj = nn.Linear(shape.width, encoder_width)

    def forward(self, context: Tensor, indices: Tensor, targets: list[Tensor], valid: Tensor | None) -> Tensor:
        images, kept, blocks = len(context), context.shape[1], len(targets)
        x = self.predictor_embed(context)
        x = x + take(self.predictor_pos_embed.repeat(images, 1, 1), indices)
        table = self.predictor_pos_embed.repeat(images, 1, 1)
        positions = torch.cat([take(table, target) for target in targets], dim=0)
        tokens = self.mask_token.repeat(positions.shape[0], positions.shape[1], 1) + positions
        x = torch.cat([x.repeat(blocks, 1, 1), tokens], dim=1)
        if valid is not None:
            valid = torch.cat([valid.repeat(blocks, 1), valid.new_ones(tokens.shape[:2])], dim=1)
        for block in self.predictor_blocks:
            x = block(x, valid)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])


class Networks(nn.Module):
    """The four networks of `config`, for weights from a state dict."""

    def __init__(self, config: Config, *, sdpa: bool = False) -> None:
        super().__init__()
        model, shape = config.model, encoder_shape(config.model.encoder)
        narrow = VitShape(model.predictor_width, model.predictor_depth, shape.heads)
        self.encoder, self.target_encoder = (Encoder(shape, model.image_size, model.patch_size, sdpa) for _ in range(2))
        self.predictor = Predictor(narrow, shape.width, model.image_size // model.patch_size, sdpa)
        self.projector = build_projector(config, shape.width)
        self.target_encoder.requires_grad_(False)


def algorithm_1(z: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """C-JEPA's Algorithm 1 on projected block means [B, M, D]: VICReg of every ordered pair of blocks, averaged."""
    images, blocks, width = z.shape
    views = z.unbind(1)
    total = z.new_zeros(())
    for first, second in itertools.permutations(range(blocks), 2):
        x, y = views[first], views[second]
        similarity = F.mse_loss(x, y)
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        spread, covariance = z.new_zeros(()), z.new_zeros(())
        for centred in (x, y):
            spread = spread + F.relu(1 - torch.sqrt(centred.var(dim=0) + 1e-4)).mean() / 2
            matrix = (centred.T @ centred) / (images - 1)
            # one row longer, the diagonal becomes a column: VICReg's public code waits for no device here either
            off_diagonal = matrix.flatten()[:-1].view(width - 1, width + 1)[:, 1:].flatten()
            covariance = covariance + off_diagonal.pow(2).sum() / width
        total = total + weights[0] * similarity + weights[1] * spread + weights[2] * covariance
    return total / (blocks * (blocks - 1))


def normalised(images: Tensor, config: Config) -> Tensor:
    """Convert bytes [B, H, W, 3] to float [B, 3, H, W] as torchvision's ToTensor and Normalize do."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.data.mean, config.data.std))
    return (images.permute(0, 3, 1, 2).contiguous().float() / 255 - mean) / std


class Trainer:
    """See `bench.step.references.Trainer`.

    Args:
        networks: on the CPU or a GPU, with the interface of `Networks` above, weights loaded.
        syncs: use a GradScaler for bf16; the host reads a norm for each weight matrix and the loss every step.
        fused: use the fused AdamW and move the averages by a few launches, not tensor by tensor.
        pairs: compute VICReg for each ordered pair of blocks, not in one pass.
    """

    def __init__(
        self, networks: Networks, config: Config, device: torch.device, schedule: Schedule, *, syncs: bool = True,
        fused: bool = False, pairs: bool = True,
    ) -> None:  # fmt: skip
        self.networks, self.config, self.device, self.schedule = networks, config, device, schedule
        self.syncs, self.fused, self.pairs = syncs, fused, pairs
        self.weights = loss_weights(config)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(networks), lr=schedule.lr, betas=schedule.betas, eps=schedule.eps,
            fused=True if fused else None,
        )  # fmt: skip
        # bf16 has fp32's range and needs no scaler; the published trainer has one
        half = config.model.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(device.type) if half and syncs and device.type == "cuda" else None

    def batch(self, drawn: Drawn) -> Batch:
        context, valid = padded(drawn.masks)
        targets = [target.long().contiguous().to(self.device) for target in drawn.masks.target.unbind(1)]
        valid = None if valid is None else valid.to(self.device)
        return normalised(drawn.images, self.config).to(self.device), context.to(self.device), valid, targets

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        images, context, valid, targets = batch
        networks = self.networks
        with self.autocast:
            with torch.no_grad():
                actual = networks.target_encoder(images)
                mark("target")
                actual = F.layer_norm(actual, actual.shape[-1:])
                actual = torch.cat([take(actual, target) for target in targets], dim=0)
            mark("loss")
            embedded = networks.encoder(images, context, valid)
            mark("context")
            predicted = networks.predictor(embedded, context, targets, valid)
            mark("predictor")
            loss = F.smooth_l1_loss(predicted, actual)
            if networks.projector is not None:
                means = predicted.unflatten(0, (len(targets), -1)).float().mean(dim=2).transpose(0, 1)
                z = networks.projector(means.flatten(0, 1)).float().unflatten(0, means.shape[:2])
                loss = loss + (algorithm_1(z, self.weights) if self.pairs else one_pass(z, self.weights))
        mark("loss")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        mark("backward")
        return loss.detach()

    def update(self) -> None:
        schedule, networks = self.schedule, self.networks
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.lr
            group["weight_decay"] = schedule.weight_decay if group["decayed"] else 0.0
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.syncs:
            trained = (p for p in networks.encoder.parameters() if p.ndim > 1)
            norms = [float(torch.norm(p.grad)) for p in trained if p.grad is not None]
            assert all(math.isfinite(norm) for norm in norms)
        self.optimizer.zero_grad()
        followed: list[Tensor] = [*networks.encoder.parameters()]
        averages: list[Tensor] = [*networks.target_encoder.parameters()]
        with torch.no_grad():
            if self.fused:
                torch._foreach_lerp_(averages, followed, 1 - schedule.ema)
            else:
                for average, parameter in zip(averages, followed, strict=True):
                    average.data.mul_(schedule.ema).add_((1 - schedule.ema) * parameter.detach().data)

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        loss = self.gradients(batch, mark)
        self.update()
        if self.syncs:
            loss = float(loss)
            assert math.isfinite(loss)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # its timer
        mark("optimizer+EMA")
        return loss


def one_pass(z: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Return the value of `algorithm_1` from M variances and M covariances, see `cjepa_fast.losses.block_vicreg`."""
    images, blocks, width = z.shape
    centred = z - z.mean(dim=0)
    covariance = torch.einsum("bmd,bme->mde", centred, centred) / (images - 1)
    variance = covariance.diagonal(dim1=1, dim2=2)
    off_diagonal = covariance.square().sum() - variance.square().sum()
    spread = F.relu(1 - torch.sqrt(variance + 1e-4)).mean()
    similarity = (z - z.mean(dim=1, keepdim=True)).square().mean() * (2 * blocks / (blocks - 1))
    return weights[0] * similarity + weights[1] * spread + weights[2] * 2 * off_diagonal / (blocks * width)


def collate(
    grid: int, images: int, generator: torch.Generator, *, min_keep: int = 10, targets: int = 4
) -> list[Tensor]:
    """Draw masks by a Python loop over images and blocks, with a grid tensor for each, and cut them to the shortest.

    The published collator draws so in its workers. Only the cost matters: all trainers are timed on the same masks.
    """
    uniform = torch.rand(2, generator=generator).tolist()

    def size(number: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        area = int(grid * grid * (scale[0] + number * (scale[1] - scale[0])))
        ratio = aspect[0] + number * (aspect[1] - aspect[0])
        return min(round(math.sqrt(area * ratio)), grid - 1), min(round(math.sqrt(area / ratio)), grid - 1)

    def block(height: int, width: int) -> Tensor:
        grid_mask = torch.zeros((grid, grid), dtype=torch.int32)
        top, left = torch.randint(0, grid - height, (1,)), torch.randint(0, grid - width, (1,))
        grid_mask[top : top + height, left : left + width] = 1
        return grid_mask

    target_size = size(uniform[0], (0.15, 0.2), (0.75, 1.5))
    context_size = size(uniform[1], (0.85, 1.0), (1.0, 1.0))
    lists: list[list[Tensor]] = [[] for _ in range(targets + 1)]
    for _ in range(images):
        allowed = []
        for index in range(targets):
            chosen = block(*target_size)
            lists[index + 1].append(torch.nonzero(chosen.flatten()).squeeze())
            complement = torch.ones((grid, grid), dtype=torch.int32)
            complement[chosen.bool()] = 0
            allowed.append(complement)
        context = torch.zeros(0)
        while len(context) <= min_keep:
            window = block(*context_size)
            for complement in allowed:
                window = window * complement
            context = torch.nonzero(window.flatten()).squeeze()
        lists[0].append(context)
    least = [min(len(rows) for rows in column) for column in lists]
    return [torch.stack([rows[:kept] for rows in column]) for column, kept in zip(lists, least, strict=True)]
