"""The truth: every piece of the method in plain PyTorch, written as the papers state it, in any dtype.

Nothing here is fast. Tests compare with it in fp64; benchmarks start from it in the working dtype. Networks are
functions of a state dict, so they share no code with `cjepa_fast.networks`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V over [..., K, d]."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1) @ value


def packed_attention(
    qkv: Tensor, heads: int, *, query: Tensor | None = None, offsets: Tensor | None = None,
    query_offsets: Tensor | None = None, target_blocks: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Compute `cjepa_fast.ops.attention`, one sequence and one target block after another."""

    def sequences(rows: Tensor, starts: Tensor | None) -> list[Tensor]:
        return list(rows) if starts is None else [rows[a:b] for a, b in itertools.pairwise(starts.tolist())]

    def attend(query: Tensor, key_value: Tensor) -> Tensor:
        key, value = key_value.chunk(2, dim=-1)
        split = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value)]  # [heads, K, d]
        return attention(*split).transpose(0, 1).flatten(1)

    if query is None:
        width = qkv.shape[-1] // 3
        query, qkv, query_offsets = qkv[..., :width], qkv[..., width:], offsets
    out = []
    for own, seen in zip(sequences(query, query_offsets), sequences(qkv, offsets), strict=True):
        if target_blocks is None or len(own) == 0:
            out.append(attend(own, seen))
            continue
        blocks, block_length = target_blocks
        context = len(own) - blocks * block_length
        out.append(attend(own[:context], seen[:context]))
        for first in range(context, len(own), block_length):
            block = slice(first, first + block_length)
            out.append(attend(own[block], torch.cat([seen[:context], seen[block]])))
    rows = torch.cat([*out, query.new_zeros(0, query.shape[-1])])
    padding = query.shape[:-1].numel() - len(rows)
    return torch.cat([rows, rows.new_zeros(padding, rows.shape[-1])]).view(query.shape)


def block(
    state: State, prefix: str, x: Tensor, heads: int, target_blocks: tuple[int, int] | None = None
) -> Tensor:  # fmt: skip
    """Compute pre-norm transformer block `prefix` of a state dict: [B, K, D] -> [B, K, D]; see `packed_attention`."""

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"]

    y = F.layer_norm(x, x.shape[-1:], *weights("norm1"), 1e-6)
    y = F.linear(y, *weights("attn.qkv"))
    if target_blocks is None:
        query, key, value = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in y.chunk(3, dim=-1))
        y = attention(query, key, value).transpose(1, 2).flatten(2)
    else:
        y = packed_attention(y, heads, target_blocks=target_blocks)
    x = x + F.linear(y, *weights("attn.proj"))
    y = F.layer_norm(x, x.shape[-1:], *weights("norm2"), 1e-6)
    return x + F.linear(F.gelu(F.linear(y, *weights("mlp.fc1"))), *weights("mlp.fc2"))


def _depth(state: State, prefix: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(prefix))


def encoder(state: State, images: Tensor, indices: Tensor | None, heads: int) -> Tensor:
    """Compute I-JEPA's encoder on normalised images [B, 3, H, W]: convolution, positions, gather, blocks, norm."""
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    if indices is not None:
        x = torch.stack([rows[kept] for rows, kept in zip(x, indices, strict=True)])
    for layer in range(_depth(state, "blocks.")):
        x = block(state, f"blocks.{layer}.", x, heads)
    return F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)


def predictor(
    state: State, context: Tensor, context_indices: Tensor, target_indices: Tensor, heads: int,
    shared_context: bool = False,
) -> Tensor:  # fmt: skip
    """Compute I-JEPA's predictor, one sequence per image and block: [B, Kc, D], [B, Kc], [B, M, Kt] -> [B, M, Kt, D].

    shared_context: one sequence per image; the context sees itself alone, a block sees the context and itself.
    """
    positions = state["predictor_pos_embed"][0]
    embedded = F.linear(context, state["predictor_embed.weight"], state["predictor_embed.bias"])
    sequences = [target_indices.flatten(1)] if shared_context else target_indices.unbind(1)
    out = []
    for targets in sequences:
        x = embedded + positions[context_indices]
        x = torch.cat([x, state["mask_token"] + positions[targets]], dim=1)
        for layer in range(_depth(state, "predictor_blocks.")):
            structure = (target_indices.shape[1], target_indices.shape[2]) if shared_context else None
            x = block(state, f"predictor_blocks.{layer}.", x, heads, structure)
        x = F.layer_norm(x, x.shape[-1:], state["predictor_norm.weight"], state["predictor_norm.bias"], 1e-6)
        x = F.linear(x, state["predictor_proj.weight"], state["predictor_proj.bias"])
        out.append(x[:, context.shape[1] :])
    return torch.stack(out, dim=1).view(*target_indices.shape, -1)


def prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str = "smooth_l1",
    offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `cjepa_fast.losses.prediction_loss`."""
    normed = F.layer_norm(targets, targets.shape[-1:])
    if offsets is not None:
        normed = [normed[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    chosen = torch.stack([rows[kept] for rows, kept in zip(normed, target_indices, strict=True)])
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predictions, chosen)
    batch, blocks = predictions.shape[:2]
    return (predictions - chosen).square().sum() / (batch * blocks)


def variance_covariance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute VICReg's variance and covariance terms (std, cov), each [V], of the views of z [N, V, D]."""
    std, cov = [], []
    for view in z.unbind(1):
        std.append(F.relu(1 - (view.var(dim=0) + 1e-4).sqrt()).mean())
        centred = view - view.mean(dim=0)
        covariance = centred.T @ centred / (len(view) - 1)
        off_diagonal = covariance - covariance.diagonal().diag()
        cov.append(off_diagonal.square().sum() / view.shape[1])
    return torch.stack(std), torch.stack(cov)


def vicreg(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute VICReg's three terms of two views [n, D], as its public code scales them (Bardes et al., ICLR 2022)."""
    std, cov = variance_covariance(torch.stack([x, y], dim=1))
    return F.mse_loss(x, y), std.mean(), cov.sum()


def block_vicreg(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute C-JEPA's Algorithm 1 to the letter: VICReg averaged over all ordered pairs of block means z [B, M, D]."""
    pairs = list(itertools.permutations(z.unbind(1), 2))
    terms = [vicreg(x, y) for x, y in pairs]
    sim, std, cov = (torch.stack(term).sum() / len(pairs) for term in zip(*terms, strict=True))
    return sim, std, cov


def context_target_vicreg(context: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute C-JEPA's pseudo-code (C.2): distance of views [B, D], variance and covariance of the context."""
    std, cov = variance_covariance(context[:, None])
    return F.mse_loss(context, target), std[0], cov[0]


def projector(state: State, x: Tensor) -> Tensor:
    """Compute `networks.heads.Projector` on rows [n, D]: linear, batch norm of all rows, ReLU, ..., linear."""
    last = max(int(name.split(".")[1]) for name in state)
    for index in range(0, last + 1, 3):
        x = F.linear(x, state[f"layers.{index}.weight"])
        if index != last:
            norm = f"layers.{index + 1}"
            mean, var = x.mean(dim=0), x.var(dim=0, unbiased=False)
            x = (x - mean) / (var + 1e-5).sqrt() * state[f"{norm}.weight"] + state[f"{norm}.bias"]
            x = F.relu(x)
    return x


def adamw(
    parameter: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int | Tensor, *, lr: float | Tensor,
    weight_decay: float | Tensor, betas: tuple[float, float] | tuple[Tensor, Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return the parameter and moments after an AdamW step (Loshchilov & Hutter, 2019); `step` counts from 1."""
    first = betas[0] * moments[0] + (1 - betas[0]) * grad
    second = betas[1] * moments[1] + (1 - betas[1]) * grad.square()
    update = (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
    return parameter * (1 - lr * weight_decay) - lr * update, (first, second)


def ema(target: Tensor, parameter: Tensor, momentum: float) -> Tensor:
    """Compute m * target + (1 - m) * parameter."""
    return momentum * target + (1 - momentum) * parameter


def cjepa_loss(
    images: Tensor, context_indices: Tensor, target_indices: Tensor, *, context_encoder: Callable[..., Tensor],
    target_encoder: Callable[..., Tensor], predict: Callable[..., Tensor], project: Callable[[Tensor], Tensor],
    weights: tuple[float, float, float],
) -> Tensor:  # fmt: skip
    """Compute L_JEPA + weights . (sim, std, cov): C-JEPA appendix C.1, with the weights multiplied out."""
    with torch.no_grad():
        targets = target_encoder(images, None)
    predictions = predict(context_encoder(images, context_indices), context_indices, target_indices)
    means = predictions.mean(dim=2)
    terms = block_vicreg(project(means.flatten(0, 1)).unflatten(0, means.shape[:2]))
    regularisation = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return prediction_loss(predictions, targets, target_indices) + regularisation


def patch_embed(
    images: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int,
    image_of: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `cjepa_fast.ops.patch_embed`, one patch after another."""
    raw, p = images.dtype == torch.uint8, patch_size
    across = images.shape[2 if raw else 3] // p

    def embed(image: Tensor, index: int) -> Tensor:
        y, x = index // across * p, index % across * p
        patch = image[y : y + p, x : x + p] if raw else image[:, y : y + p, x : x + p]
        return weight @ patch.flatten().to(weight.dtype) + bias + positions[index]

    if image_of is not None:
        assert indices is not None
        tokens = zip(indices.tolist(), image_of.tolist(), strict=True)
        rows = [torch.zeros_like(bias) if image == -1 else embed(images[image], index) for index, image in tokens]
        return torch.stack(rows)
    kept = [list(range(len(positions)))] * len(images) if indices is None else indices.tolist()
    return torch.stack(
        [torch.stack([embed(image, index) for index in row]) for image, row in zip(images, kept, strict=True)]
    )


def predictor_rows(context: Tensor, table: Tensor, target_indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute `cjepa_fast.ops.predictor_rows`, one sequence after another."""
    batch, kept = len(target_indices), context.shape[-2]
    ends = [kept * image for image in range(batch + 1)] if offsets is None else offsets.tolist()
    rows = context.reshape(-1, context.shape[-1])
    sequences = []
    for image, blocks in enumerate(target_indices):
        for targets in blocks:
            sequences += [rows[ends[image] : ends[image + 1]], table[targets]]
    tokens = torch.cat(sequences)
    if offsets is None:
        return tokens.unflatten(0, (batch, target_indices.shape[1], -1))
    return F.pad(tokens, (0, 0, 0, target_indices.shape[1] * (len(context) - ends[-1])))
