"""The encoder and the predictor of I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243), as plain modules.

Parameter names and layouts are those of the released I-JEPA checkpoints, so timm's `vit_*_gap` models load an encoder's
state dict unchanged. Compilation, sharding and rounded copies of the weights are applied from outside.

Shapes: B images, N = (H/p)(W/p) patches, K kept patches, M target blocks of Kt patches, Kc context patches, T packed
tokens, D and d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_fast import ops
from cjepa_fast.config import VitShape, encoder_shape
from cjepa_fast.errors import UserError
from cjepa_fast.networks.precision import LayerNorm, Linear, linear_layers, quantised
from cjepa_fast.networks.sequences import FIXED, Layout, Origin, Selection

RGB = tuple[float, float, float]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Impl(NamedTuple):
    """Implementations of the operations, see `cjepa_fast.ops`; every choice computes the same.

    kernels: of all operations but attention: "auto", "triton" or "eager".
    attention: "auto", "triton", "sdpa", "xformers" or "eager".
    """

    kernels: str = "auto"
    attention: str = "auto"


AUTO = Impl()


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed 2-D sine-cosine position table [1, N, width] fp32, patches in row-major order.

    The first half of the width encodes the column, the second half the row. Each half is [sin | cos] over the
    frequencies 10000^(-i / (width/4)) (Vaswani et al., 2017, one axis at a time, as in MAE and I-JEPA).

    Raises UserError if `width` is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"width {width} is not a multiple of 4, which 2-D sine-cosine positions need")
    # fp64 keeps the table independent of the platform's fp32 sine
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]


class Attention(nn.Module):
    """Bidirectional multi-head self-attention; arguments as for `Block`."""

    def __init__(self, width: int, heads: int, impl: Impl) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not divisible by {heads} attention heads")
        self.width, self.heads, self.impl = width, heads, impl.attention
        self.qkv = Linear(width, 3 * width, impl.kernels)
        self.proj = Linear(width, width, impl.kernels)

    def forward(self, x: Tensor, layout: Layout, wanted: Selection | None, origin: Origin | None) -> Tensor:
        # Sequences with target blocks compute all queries: their structure is that of whole sequences.
        chosen = wanted if layout.target_blocks is None else None
        query = None
        # In float8, Inductor cannot compile products with a part of a bias, so all queries are computed.
        if chosen is not None and origin is None and self.qkv.float8 is None:
            query, qkv = self.qkv.parts([chosen.of(x), x], [self.width, 2 * self.width])
        else:
            qkv = self.qkv(x)
            if origin is not None:
                qkv = origin.gather(qkv)
            if chosen is not None:
                query, qkv = chosen.of(qkv[..., : self.width]), qkv[..., self.width :]
        queries = FIXED if chosen is None else chosen.layout
        out = ops.attention(
            qkv, self.heads, query=query, offsets=layout.offsets, max_length=layout.max_length,
            query_offsets=queries.offsets, max_query_length=queries.max_length, target_blocks=layout.target_blocks,
            impl=self.impl,
        )  # fmt: skip
        return self.proj(out if wanted is None or chosen is not None else wanted.of(out))


class Mlp(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, kernels: str) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, kernels)
        self.fc2 = Linear(hidden, width, kernels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """Pre-norm transformer block: tokens [S, K, D] or packed [T, D] -> the same tokens, or those `wanted`.

    forward(x, layout, wanted, origin)
        layout: the sequences that the tokens form.
        wanted: the tokens to compute, if not all. The block leaves out the work for all others.
        origin: the unique tokens that x was gathered from, if any. The block then projects each of them once.
    """

    def __init__(self, shape: VitShape, impl: Impl) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads, impl)
        self.norm2 = LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape.width, round(shape.width * shape.mlp_ratio), impl.kernels)

    def forward(
        self, x: Tensor, layout: Layout = FIXED, wanted: Selection | None = None, origin: Origin | None = None
    ) -> Tensor:  # fmt: skip
        tokens = x if origin is None else origin.tokens()
        rest = x if wanted is None else wanted.of(x)
        x = rest + self.attn(self.norm1(tokens), layout, wanted, origin)
        return x + self.mlp(self.norm2(x))


def blocks(network: nn.Module, *, trained: bool | None = None) -> Iterator[Block]:
    """Yield the transformer blocks of a network, or only the trained or the untrained ones."""
    for module in network.modules():
        if isinstance(module, Block) and trained in (None, is_trained(module)):
            yield module


def is_trained(network: nn.Module) -> bool:
    """Return whether some parameter needs a gradient."""
    return any(parameter.requires_grad for parameter in network.parameters())


class PatchEmbed(nn.Module):
    """Linear embedding of the kept p x p patches, plus their positions.

    `proj` is a Conv2d for its checkpoint layout [D, 3, p, p] alone. Its stride equals its kernel, so it is a matrix
    product over flattened patches, and only kept patches are multiplied.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int, width: int, mean: RGB, std: RGB, kernels: str) -> None:
        super().__init__()
        self.patch_size, self.kernels = patch_size, kernels
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(
        self, images: Tensor, indices: Tensor | None, positions: Tensor, dtype: torch.dtype, image_of: Tensor | None
    ) -> Tensor:  # fmt: skip
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        if images.dtype == torch.uint8:  # [B, H, W, 3]: the weights absorb the normalisation, exactly up to rounding
            scaled = weight / self.std[:, None, None]
            bias = bias - torch.einsum("dchw,c->d", scaled, self.mean)
            weight = (scaled / 255).permute(0, 2, 3, 1)
        return ops.patch_embed(
            images, indices, weight.flatten(1).to(dtype), bias, positions, patch_size=self.patch_size,
            image_of=image_of, impl=self.kernels,
        )  # fmt: skip


class Encoder(nn.Module):
    """Vision transformer without class token: every output token is a patch.

    forward(images, indices, image_of, layout, wanted) -> [B, K, D] in `dtype`, or [T, D] for packed patches
        images: float [B, 3, H, W], normalised, or uint8 [B, H, W, 3] raw pixels.
        indices: integer [B, K], the kept patches of each image in row-major numbering; None keeps all N.
        image_of, layout: int32 [T] and the sequences, if `indices` [T] are packed, image after image.
        wanted: the tokens to return, if not all. The last block then leaves out the work for all others.

    Args:
        image_size, patch_size: in pixels; the patch size must divide the image size.
        mean, std: per-channel statistics of images in [0, 1], used for uint8 images.
        depth_rescale: divide the initial `attn.proj` and `mlp.fc2` weights of block l by sqrt(2 l). The I-JEPA
            code has this rule and then overwrites the weights, so the published runs correspond to False.
        dtype: type of activations and matrix products; parameters are fp32.

    Raises UserError for sizes that do not divide.
    """

    pos_embed: Tensor

    def __init__(
        self, shape: VitShape, image_size: int, patch_size: int, *, mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD,
        depth_rescale: bool = False, dtype: torch.dtype = torch.float32, impl: Impl = AUTO,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.image_size, self.dtype = shape.width, image_size, dtype
        self.grid = _grid(image_size, patch_size)
        # a buffer, as the positions are fixed but part of released checkpoints
        self.register_buffer("pos_embed", sincos_positions(shape.width, self.grid))
        self.patch_embed = PatchEmbed(patch_size, shape.width, mean, std, impl.kernels)
        self.blocks = nn.ModuleList(Block(shape, impl) for _ in range(shape.depth))
        self.norm = LayerNorm(shape.width, eps=1e-6)
        _initialise(self, self.blocks, depth_rescale)

    def forward(
        self, images: Tensor, indices: Tensor | None = None, image_of: Tensor | None = None, layout: Layout = FIXED,
        wanted: Selection | None = None,
    ) -> Tensor:  # fmt: skip
        height_width = tuple(images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:])
        if height_width != (self.image_size, self.image_size):
            raise UserError(f"images are {height_width}, the encoder was built for {self.image_size} px squares")
        x = self.patch_embed(images, indices, self.pos_embed[0], self.dtype, image_of)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.norm(self.blocks[-1](x, layout, wanted))

    def use_float8(self, impl: str) -> None:
        """Multiply in float8, without gradient, in the blocks' linear layers, which take nearly all of the work."""
        for layer in linear_layers(self.blocks):
            layer.float8 = impl

    def quantised(self) -> AbstractContextManager[None]:
        """Return a context within which float8 weights are rounded once: see `precision.quantised`."""
        return quantised(self.blocks, self.dtype)


class Predictor(nn.Module):
    """Narrow vision transformer that predicts the target tokens of each block from the context tokens.

    forward(context [B, Kc, D], context_indices [B, Kc], target_indices [B, M, Kt], offsets=None) -> [B, M, Kt, D]
        in the context's type. Packed contexts are [T, D] and [T], with offsets int32 [B + 1].

    Each sequence holds the context and the mask tokens of one block. The first block projects each context token and
    each position once, the last block computes target tokens alone.

    Args:
        grid: rows and columns of patches.
        depth_rescale: as for `Encoder`.
        shared_context: put all blocks of an image into one sequence, whose context sees itself alone, and whose blocks
            see the context and themselves. A different function, at a fraction of the work.
    """

    predictor_pos_embed: Tensor

    def __init__(
        self, shape: VitShape, encoder_width: int, grid: tuple[int, int], *, depth_rescale: bool = False,
        shared_context: bool = False, impl: Impl = AUTO,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels, self.shared_context = impl.kernels, shared_context
        self.predictor_embed = Linear(encoder_width, shape.width, impl.kernels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_buffer("predictor_pos_embed", sincos_positions(shape.width, grid))
        self.predictor_blocks = nn.ModuleList(Block(shape, impl) for _ in range(shape.depth))
        self.predictor_norm = LayerNorm(shape.width, eps=1e-6)
        self.predictor_proj = Linear(shape.width, encoder_width, impl.kernels)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        _initialise(self, self.predictor_blocks, depth_rescale)

    def forward(
        self, context: Tensor, context_indices: Tensor, target_indices: Tensor, offsets: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        context = self.predictor_embed(context)
        positions = self.predictor_pos_embed[0]  # fp32: added in fp32 and rounded once
        # the index of packed padding is -1
        indices = context_indices.long() if offsets is None else context_indices.long().clamp_min(0)
        context = (context + F.embedding(indices, positions)).to(context.dtype)
        masks = (self.mask_token[0] + positions).to(context.dtype)

        targets, structure = target_indices, None
        if self.shared_context:  # one sequence with all blocks
            structure = (target_indices.shape[1], target_indices.shape[2])
            targets = target_indices.flatten(1)[:, None]
        _, sequences, length = targets.shape  # sequences of an image, target tokens of a sequence
        if offsets is None:
            layout, wanted = Layout(target_blocks=structure), Selection(context.shape[1], length)
            total = context.shape[1] + length
        else:
            starts = ops.sequence_offsets(offsets, sequences, length)
            longest = len(positions) + length  # a constant, unlike the longest context
            layout = Layout(starts, longest, structure)
            wanted = Selection(index=starts[1:, None] + torch.arange(-length, 0, device=starts.device))
            total = sequences * len(context) + targets.numel()

        origin = Origin(context, masks, targets, offsets, total, self.kernels)
        x = origin.gather(origin.tokens())
        last = len(self.predictor_blocks) - 1
        for index, block in enumerate(self.predictor_blocks):
            x = block(x, layout, wanted if index == last else None, origin if index == 0 else None)
        return self.predictor_proj(self.predictor_norm(x)).view(*target_indices.shape, -1)


def build_encoder(name: str, image_size: int, patch_size: int, **options: Any) -> Encoder:
    """Build the encoder called `name` in `ENCODERS`, randomly initialised from torch's global generator.

    `options` are those of `Encoder`. Raises UserError for an unknown name or sizes that do not divide.
    """
    return Encoder(encoder_shape(name), image_size, patch_size, **options)


def build_predictor(
    name: str, image_size: int, patch_size: int, depth: int, width: int = 384, heads: int | None = None, **options: Any
) -> Predictor:  # fmt: skip
    """Build the predictor for the encoder called `name`, with the encoder's number of heads unless given.

    Published: width 384; depth 6 for tiny to base, 12 for large and huge, 16 for giant (I-JEPA, C-JEPA section 4.1).
    `options` are those of `Predictor`. Raises UserError for an unknown name or sizes that do not divide.
    """
    encoder = encoder_shape(name)
    shape = VitShape(width, depth, heads or encoder.heads)
    return Predictor(shape, encoder.width, _grid(image_size, patch_size), **options)


def _grid(image_size: int, patch_size: int) -> tuple[int, int]:
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise UserError(f"image size {image_size} is not divisible by patch size {patch_size}")
    return image_size // patch_size, image_size // patch_size


def _initialise(network: nn.Module, blocks: nn.ModuleList, depth_rescale: bool) -> None:
    """Draw weight matrices from a truncated normal of std 0.02; set biases to zero and layer norms to one."""
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
