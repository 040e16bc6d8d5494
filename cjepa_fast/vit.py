"""The encoder and the predictor of I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243), as plain modules.

Parameter names and layouts are those of the released I-JEPA checkpoints, so timm's `vit_*_gap` models load an
encoder's state dict unchanged. Compilation, sharding and precision of the optimizer are applied from outside.

Shapes: B images, N = (H/p)(W/p) patches, K kept patches, M target blocks of Kt patches, Kc context patches, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_fast import ops
from cjepa_fast.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VitShape(NamedTuple):
    """Width D, number of blocks, attention heads and hidden-to-width ratio of the MLP."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


ENCODERS: dict[str, VitShape] = {
    "vit_demo": VitShape(96, 3, 4),  # ours: a minute or two on two CPU cores
    "vit_pico": VitShape(128, 4, 4),  # ours: CIFAR-10 on two CPU cores
    "vit_tiny": VitShape(192, 12, 3),  # tiny to base: DeiT (Touvron et al., 2021), ViT (Dosovitskiy et al., 2021)
    "vit_small": VitShape(384, 12, 6),
    "vit_base": VitShape(768, 12, 12),
    "vit_large": VitShape(1024, 24, 16),
    "vit_huge": VitShape(1280, 32, 16),
    "vit_giant": VitShape(1408, 40, 16, 48 / 11),  # Zhai et al., 2022 (arXiv 2106.04560), table 2
}


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine position table [1, N, width] fp32, patches in row-major order.

    The first half of the width encodes the column, the second half the row; each half is [sin | cos] over the
    frequencies 10000^(-i / (width/4)) (Vaswani et al., 2017, one axis at a time, as in MAE and I-JEPA).

    Raises UserError if `width` is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"width {width} is not a multiple of 4, which 2-D sine-cosine positions need")
    # float64 keeps the table independent of the platform's fp32 sin, before one rounding
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of each image: x [B, N, C], indices [B, K] (any integer dtype) -> [B, K, C]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], indices.long()]


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: fp32 master weights are cast, nothing else decides."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's dtype (statistics are fp32 inside torch's kernel)."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype
        return F.layer_norm(input, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention: [B, K, D] -> [B, K, D]."""

    def __init__(self, width: int, heads: int, impl: str = "auto") -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not divisible by {heads} attention heads")
        self.heads, self.impl = heads, impl
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ops.attention(self.qkv(x), self.heads, impl=self.impl))


class Mlp(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: [B, K, D] -> [B, K, D]."""

    def __init__(self, shape: VitShape, attention: str = "auto") -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads, attention)
        self.norm2 = LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape.width, round(shape.width * shape.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, of the kept patches only, at their positions [N, D].

    `proj` is a Conv2d for the sake of its checkpoint layout [D, 3, p, p]; as stride equals kernel it is a matrix
    product over flattened patches, and gathering the patches first leaves out the work for dropped ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, patch_size: int, width: int, mean: tuple[float, float, float], std: tuple[float, float, float],
        kernels: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_size, self.kernels = patch_size, kernels
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: Tensor, indices: Tensor | None, positions: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        if images.dtype == torch.uint8:  # [B, H, W, 3], normalisation folded into the weights: exact up to rounding
            scaled = weight / self.std[:, None, None]
            bias = bias - torch.einsum("dchw,c->d", scaled, self.mean)
            weight = (scaled / 255).permute(0, 2, 3, 1)
        return ops.patch_embed(
            images, indices, weight.flatten(1).to(dtype), bias, positions, patch_size=self.patch_size, impl=self.kernels
        )


class Encoder(nn.Module):
    """Vision transformer without class token: every output row is a patch.

    forward(images, indices=None) -> [B, K, D] in `dtype`
        images: float [B, 3, H, W], normalised, or uint8 [B, H, W, 3] raw pixels.
        indices: integer [B, K], the kept patches of each image in row-major numbering; None keeps all N.

    `kernels` and `attention` pick implementations (see `cjepa_fast.ops`), not what is computed.
    """

    pos_embed: Tensor

    def __init__(
        self,
        shape: VitShape,
        image_size: int,
        patch_size: int,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        depth_rescale: bool = False,
        dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.width, self.image_size, self.dtype = shape.width, image_size, dtype
        self.grid = _grid(image_size, patch_size)
        # a buffer: fixed, yet part of the state dict under the name that checkpoints use
        self.register_buffer("pos_embed", sincos_positions(shape.width, self.grid))
        self.patch_embed = PatchEmbed(patch_size, shape.width, mean, std, kernels)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.depth))
        self.norm = LayerNorm(shape.width, eps=1e-6)
        _initialise(self, self.blocks, depth_rescale)

    def forward(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        height_width = tuple(images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:])
        if height_width != (self.image_size, self.image_size):
            raise UserError(f"images are {height_width}, the encoder was built for {self.image_size} px squares")
        x = self.patch_embed(images, indices, self.pos_embed[0], self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Narrow vision transformer that predicts the target rows of each block from the context rows.

    forward(context [B, Kc, D], context_indices [B, Kc], target_indices [B, M, Kt]) -> [B, M, Kt, D]
        in the context's dtype. Each block is predicted alone: its sequence is the context and its own mask tokens.

    `kernels`, `attention`: as for `Encoder`.
    """

    predictor_pos_embed: Tensor

    def __init__(
        self, shape: VitShape, encoder_width: int, grid: tuple[int, int], *, depth_rescale: bool = False,
        kernels: str = "auto", attention: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels = kernels
        self.predictor_embed = Linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_buffer("predictor_pos_embed", sincos_positions(shape.width, grid))
        self.predictor_blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.depth))
        self.predictor_norm = LayerNorm(shape.width, eps=1e-6)
        self.predictor_proj = Linear(shape.width, encoder_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        _initialise(self, self.predictor_blocks, depth_rescale)

    def forward(self, context: Tensor, context_indices: Tensor, target_indices: Tensor) -> Tensor:
        x = ops.predictor_tokens(
            self.predictor_embed(context), self.mask_token, self.predictor_pos_embed[0], context_indices,
            target_indices, impl=self.kernels,
        )  # [B, M, Kc + Kt, d]  # fmt: skip
        x = x.flatten(0, 1)
        for block in self.predictor_blocks:
            x = block(x)
        # norm and projection act row by row, so the context rows can go before them
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :])).unflatten(0, target_indices.shape[:2])


def build_encoder(
    name: str,
    image_size: int,
    patch_size: int,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    depth_rescale: bool = False,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
    attention: str = "auto",
) -> Encoder:
    """Builds the encoder called `name` in `ENCODERS`, randomly initialised from torch's global generator.

    Args:
        image_size, patch_size: pixels; the patch size must divide the image size.
        mean, std: per-channel statistics of images in [0, 1], used for uint8 input.
        depth_rescale: divide the initial `attn.proj` and `mlp.fc2` weights of block l by sqrt(2 l). The I-JEPA
            code has this rule and then overwrites it, so the published runs correspond to False.
        dtype: of activations and matrix products; parameters are fp32 in any case.
        kernels: "auto", "triton" or "eager"; attention: see `cjepa_fast.ops.attention`.

    Raises UserError for an unknown name or sizes that do not divide.
    """
    shape = encoder_shape(name)
    return Encoder(
        shape, image_size, patch_size, mean=mean, std=std, depth_rescale=depth_rescale, dtype=dtype, kernels=kernels,
        attention=attention,
    )  # fmt: skip


def build_predictor(
    name: str,
    image_size: int,
    patch_size: int,
    depth: int,
    width: int = 384,
    heads: int | None = None,
    *,
    depth_rescale: bool = False,
    kernels: str = "auto",
    attention: str = "auto",
) -> Predictor:
    """Builds the predictor that goes with the encoder called `name` (its width and, unless given, its heads).

    Published: width 384; depth 6 for tiny to base, 12 for large and huge, 16 for giant (I-JEPA, C-JEPA section 4.1).

    Raises UserError for an unknown name or sizes that do not divide.
    """
    encoder = encoder_shape(name)
    shape = VitShape(width, depth, heads or encoder.heads)
    return Predictor(
        shape, encoder.width, _grid(image_size, patch_size), depth_rescale=depth_rescale, kernels=kernels,
        attention=attention,
    )  # fmt: skip


def encoder_shape(name: str) -> VitShape:
    """The entry of `ENCODERS`; raises UserError that lists the known names."""
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    return ENCODERS[name]


def _grid(image_size: int, patch_size: int) -> tuple[int, int]:
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise UserError(f"image size {image_size} is not divisible by patch size {patch_size}")
    return image_size // patch_size, image_size // patch_size


def _initialise(network: nn.Module, blocks: nn.ModuleList, depth_rescale: bool) -> None:
    """Truncated normal of std 0.02 for every weight matrix, zero biases, unit layer norms."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    if depth_rescale:
        with torch.no_grad():
            for layer, block in enumerate(blocks, start=1):
                assert isinstance(block, Block)
                block.attn.proj.weight.div_(math.sqrt(2 * layer))
                block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
