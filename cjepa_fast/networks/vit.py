"""The encoder and the predictor of I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243), as plain modules.

Parameter names and layouts are those of the released I-JEPA checkpoints, so timm's `vit_*_gap` models load an
encoder's state dict unchanged. Compilation, sharding and precision of the optimizer are applied from outside.

Shapes: B images, N = (H/p)(W/p) patches, K kept patches, M target blocks of Kt patches, Kc context patches, D width.

What a block need not do twice, or at all, it can be told (`Selection`, `Origin`): the results are the same up to
rounding, the work is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cjepa_fast import ops
from cjepa_fast.config import VitShape, encoder_shape
from cjepa_fast.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


class _Copy(torch.autograd.Function):
    """A parameter's rounded copy in its place: the copy goes forward, its gradient back to the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Rounding:
    """Fp32 master weights for a module that computes in its input's dtype, which alone decides.

    They are cast in every forward pass, or read from the copies that `hold_copies` gave the module.
    """

    weight: Tensor
    bias: Tensor | None
    weight_copy: Tensor | None = None
    bias_copy: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in `dtype`."""
        if self.weight_copy is None:
            return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        assert self.weight_copy.dtype == dtype, (self.weight_copy.dtype, dtype)
        if self.weight_copy.requires_grad or not self.weight.requires_grad:
            return self.weight_copy, self.bias_copy
        bias = None if self.bias is None else _Copy.apply(self.bias, self.bias_copy)
        return _Copy.apply(self.weight, self.weight_copy), bias  # pyright: ignore[reportReturnType]


class Linear(_Rounding, nn.Linear):
    """A linear layer in its input's dtype, or if `float8` names an implementation in float8, without gradient."""

    float8: str | None = None
    float8_weight: tuple[Tensor, Tensor] | None = None  # for some passes, see `Encoder.quantised`

    def __init__(self, width: int, out: int, kernels: str = "auto") -> None:
        super().__init__(width, out)
        self.kernels = kernels

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        weight, bias = self.rounded(input.dtype)
        if self.float8 is None:
            return ops.linear(input, weight, bias, gelu=gelu, impl=self.kernels)
        assert bias is not None
        out = ops.float8_linear(input, *(self.float8_weight or ops.quantise_rows(weight)), bias, impl=self.float8)
        return F.gelu(out) if gelu else out

    def parts(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Products of several inputs, each with its own share of the layer's outputs; not in float8."""
        weight, bias = self.rounded(inputs[0].dtype)
        assert bias is not None and self.float8 is None
        each = zip(inputs, weight.split(list(sizes)), bias.split(list(sizes)), strict=True)
        return [ops.linear(*of, impl=self.kernels) for of in each]


class LayerNorm(_Rounding, nn.LayerNorm):
    """Layer norm in its input's dtype (statistics are fp32 inside torch's kernel)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, *self.rounded(input.dtype), self.eps)


def hold_copies(network: nn.Module, dtype: torch.dtype, *, rounded_grads: bool) -> dict[Tensor, Tensor]:
    """Gives linear layers and layer norms copies of their parameters in `dtype`: no pass need cast them.

    Whoever changes the parameters must change the copies: `engine.optim.AdamW` does. Not for parameters that FSDP2
    shards: it makes copies of its own.

    Args:
        rounded_grads: leave gradients in `dtype`, as their products give them, instead of widening them to fp32. For
            one backward pass a step: several would add up in `dtype`. The copies are leaves then, which hand their
            gradients on: to a compiler, which does not know of `grad_dtype`, a parameter's gradient is fp32.

    Returns the copies by parameter.
    """
    copies = {}
    for module in network.modules():
        if isinstance(module, _Rounding):
            for name in ("weight", "bias"):
                if (parameter := getattr(module, name)) is not None:
                    copies[parameter] = parameter.detach().to(dtype)
                    setattr(module, f"{name}_copy", copies[parameter])
                    if rounded_grads and parameter.requires_grad:
                        parameter.grad_dtype = dtype
                        hand_on = functools.partial(_hand_on, parameter)
                        copies[parameter].requires_grad_().register_post_accumulate_grad_hook(hand_on)
    return copies


def _hand_on(parameter: Tensor, copy: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = copy.grad
    elif copy.grad is not None:  # gradients that keep their memory
        parameter.grad += copy.grad
    copy.grad = None


class Layout(NamedTuple):
    """How rows form sequences: [S, K, D] of one length, or packed [T, D], one sequence behind another.

    offsets: int32 [S + 1] of packed rows, where each sequence begins, and the end of the last; behind it is padding.
    max_length: at least the longest packed sequence.
    target_blocks: (M, Kt) where a sequence is [context | block 1 | ... | block M]: the context sees itself, a block the
        context and itself.
    """

    offsets: Tensor | None = None
    max_length: int | None = None
    target_blocks: tuple[int, int] | None = None


FIXED = Layout()


class Selection(NamedTuple):
    """The rows that go on, where the others only serve as keys and values: `count` from `first` on in every sequence of
    one length, or the flattened rows `index`, an integer [S, Kq], or [T] with a packed `layout` of their own.
    """

    first: int = 0
    count: int = 0  # given, as a compiler of dynamic shapes cannot divide by a difference
    index: Tensor | None = None
    layout: Layout = FIXED

    def of(self, x: Tensor) -> Tensor:
        """[S, K, W] or [T, W] -> [S, Kq, W] or [Tq, W]."""
        if self.index is None:
            return x.narrow(1, self.first, self.count)
        return x.flatten(0, -2).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


class Origin(NamedTuple):
    """What the rows of the predictor's first block are copies of: context rows, once for every target block, and one
    row per patch position, for every target patch there. Norm and projections act row by row, so they can go first.
    """

    context: Tensor  # [B, Kc, d] or packed [T, d]
    positions: Tensor  # [N, d], the mask token at each position
    target_indices: Tensor  # integer [B, M, Kt]
    offsets: Tensor | None  # int32 [B + 1] of packed contexts
    total: int  # rows of a sequence, or of all that are packed
    impl: str

    def rows(self) -> Tensor:
        """[R, d], every row once."""
        return torch.cat([self.context.flatten(0, -2), self.positions])

    def repeat(self, values: Tensor) -> Tensor:
        """What was computed for `rows`, [R, W], as sequences: [B M, Kc + Kt, W] or packed [rows, W]."""
        context, positions = values.split([len(values) - len(self.positions), len(self.positions)])
        context = context.view(*self.context.shape[:-1], -1)
        rows = ops.predictor_rows(
            context, positions, self.target_indices, offsets=self.offsets, total=self.total, impl=self.impl
        )
        return rows if self.offsets is not None else rows.flatten(0, 1)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention: rows -> rows, see `Block`."""

    def __init__(self, width: int, heads: int, impl: str = "auto", kernels: str = "auto") -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not divisible by {heads} attention heads")
        self.width, self.heads, self.impl = width, heads, impl
        self.qkv = Linear(width, 3 * width, kernels)
        self.proj = Linear(width, width, kernels)

    def forward(
        self, x: Tensor, layout: Layout = FIXED, wanted: Selection | None = None, origin: Origin | None = None
    ) -> Tensor:  # fmt: skip
        # structured sequences take all of their queries
        chosen = wanted if layout.target_blocks is None else None
        query = None
        # Inductor cannot compile float8 products with a part of a bias
        if chosen is not None and origin is None and self.qkv.float8 is None:
            query, qkv = self.qkv.parts([chosen.of(x), x], [self.width, 2 * self.width])
        else:
            qkv = self.qkv(x)
            if origin is not None:
                qkv = origin.repeat(qkv)
            if chosen is not None:
                query, qkv = chosen.of(qkv[..., : self.width]), qkv[..., self.width :]
        queries = FIXED if chosen is None else chosen.layout
        out = ops.attention(
            qkv, self.heads, query=query, offsets=layout.offsets, max_length=layout.max_length,
            query_offsets=queries.offsets, max_query_length=queries.max_length, target_blocks=layout.target_blocks,
            impl=self.impl, or_auto=True,
        )  # fmt: skip
        return self.proj(out if wanted is None or chosen is not None else wanted.of(out))


class Mlp(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, kernels: str = "auto") -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, kernels)
        self.fc2 = Linear(hidden, width, kernels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """Pre-norm transformer block: rows, formed into sequences by `layout`, to the same rows or those `wanted`.

    origin: what x's rows are copies of, if they are; norm and projection are then computed once for each.
    """

    def __init__(self, shape: VitShape, attention: str = "auto", kernels: str = "auto") -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads, attention, kernels)
        self.norm2 = LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape.width, round(shape.width * shape.mlp_ratio), kernels)

    def forward(
        self, x: Tensor, layout: Layout = FIXED, wanted: Selection | None = None, origin: Origin | None = None
    ) -> Tensor:  # fmt: skip
        rows = x if origin is None else origin.rows()
        rest = x if wanted is None else wanted.of(x)
        x = rest + self.attn(self.norm1(rows), layout, wanted, origin)
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

    def forward(
        self, images: Tensor, indices: Tensor | None, positions: Tensor, dtype: torch.dtype,
        image_of: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        if images.dtype == torch.uint8:  # [B, H, W, 3], normalisation folded into the weights: exact up to rounding
            scaled = weight / self.std[:, None, None]
            bias = bias - torch.einsum("dchw,c->d", scaled, self.mean)
            weight = (scaled / 255).permute(0, 2, 3, 1)
        return ops.patch_embed(
            images, indices, weight.flatten(1).to(dtype), bias, positions, patch_size=self.patch_size,
            image_of=image_of, impl=self.kernels,
        )  # fmt: skip


class Encoder(nn.Module):
    """Vision transformer without class token: every output row is a patch.

    forward(images, indices=None, ...) -> [B, K, D] in `dtype`, or [T, D] for packed patches
        images: float [B, 3, H, W], normalised, or uint8 [B, H, W, 3] raw pixels.
        indices: integer [B, K], the kept patches of each image in row-major numbering; None keeps all N.
        image_of, layout: int32 [T] and the sequences, if indices [T] are packed, image after image.
        wanted: the rows that are to be returned, if not all; the last block then leaves out work for the others.

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
        self.blocks = nn.ModuleList(Block(shape, attention, kernels) for _ in range(shape.depth))
        self.norm = LayerNorm(shape.width, eps=1e-6)
        _initialise(self, self.blocks, depth_rescale)

    def forward(
        self, images: Tensor, indices: Tensor | None = None, image_of: Tensor | None = None,
        layout: Layout = FIXED, wanted: Selection | None = None,
    ) -> Tensor:  # fmt: skip
        height_width = tuple(images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:])
        if height_width != (self.image_size, self.image_size):
            raise UserError(f"images are {height_width}, the encoder was built for {self.image_size} px squares")
        x = self.patch_embed(images, indices, self.pos_embed[0], self.dtype, image_of)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.norm(self.blocks[-1](x, layout, wanted))

    def use_float8(self, impl: str = "auto") -> None:
        """From now on the blocks' linear layers, which take nearly all of the work, multiply in float8: no gradient."""
        for layer in self._linear_layers():
            layer.float8 = impl

    @contextmanager
    def quantised(self) -> Iterator[None]:
        """Rounds float8 layers' weights now, for all passes within, not in each; they must not change meanwhile.

        Weights that FSDP2 shards are whole within a pass only, and are rounded there.
        """
        layers = [layer for layer in self._linear_layers() if layer.float8 and not isinstance(layer.weight, DTensor)]
        for layer in layers:
            layer.float8_weight = ops.quantise_rows(layer.rounded(self.dtype)[0])
        try:
            yield
        finally:
            for layer in layers:
                layer.float8_weight = None

    def _linear_layers(self) -> list[Linear]:
        return [module for module in self.blocks.modules() if isinstance(module, Linear)]


class Predictor(nn.Module):
    """Narrow vision transformer that predicts the target rows of each block from the context rows.

    forward(context [B, Kc, D], context_indices [B, Kc], target_indices [B, M, Kt], offsets=None) -> [B, M, Kt, D]
        in the context's dtype. Packed contexts are [T, D] and [T], with offsets int32 [B + 1].

    Each block is predicted alone: its sequence is the context and its own mask tokens. With `shared_context` the
    context passes once instead and sees itself alone, while each block sees the context and itself: another function,
    at a fraction of the work.

    `targets_only`: the last block leaves out work for context rows, of which nothing is made. `shared_start`: the first
    block projects every context row and every position once, not once a target block. Both change rounding only.
    `kernels`, `attention`: as for `Encoder`.
    """

    predictor_pos_embed: Tensor

    def __init__(
        self, shape: VitShape, encoder_width: int, grid: tuple[int, int], *, depth_rescale: bool = False,
        shared_context: bool = False, targets_only: bool = True, shared_start: bool = True, kernels: str = "auto",
        attention: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels, self.shared_context = kernels, shared_context
        # with a shared context there is nothing to share at the start
        self.targets_only, self.shared_start = targets_only, shared_start and not shared_context
        self.predictor_embed = Linear(encoder_width, shape.width, kernels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_buffer("predictor_pos_embed", sincos_positions(shape.width, grid))
        self.predictor_blocks = nn.ModuleList(Block(shape, attention, kernels) for _ in range(shape.depth))
        self.predictor_norm = LayerNorm(shape.width, eps=1e-6)
        self.predictor_proj = Linear(shape.width, encoder_width, kernels)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        _initialise(self, self.predictor_blocks, depth_rescale)

    def forward(
        self, context: Tensor, context_indices: Tensor, target_indices: Tensor, offsets: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        context = self.predictor_embed(context)
        layout, targets = self._sequences(context, target_indices, offsets)
        origin = None
        if self.shared_start:
            positions = self.predictor_pos_embed[0]  # fp32: added precisely, rounded once
            indices = context_indices.long() if offsets is None else context_indices.long().clamp_min(0)  # of padding
            context = (context + F.embedding(indices, positions)).to(context.dtype)
            masks = (self.mask_token[0] + positions).to(context.dtype)
            _, blocks, length = target_indices.shape
            total = blocks * len(context) + target_indices.numel() if offsets is not None else context.shape[1] + length
            origin = Origin(context, masks, target_indices, offsets, total, self.kernels)
            x = origin.repeat(origin.rows())
        else:
            x = ops.predictor_tokens(
                context, self.mask_token, self.predictor_pos_embed[0], context_indices, target_indices,
                offsets=offsets, shared_context=self.shared_context, impl=self.kernels,
            )  # fmt: skip
            if offsets is None and not self.shared_context:
                x = x.flatten(0, 1)  # [B, M, Kc + Kt, d]
        first, last = 0, len(self.predictor_blocks) - 1
        for index, block in enumerate(self.predictor_blocks):
            x = block(
                x, layout, targets if self.targets_only and index == last else None,
                origin if index == first else None,
            )  # fmt: skip
        # norm and projection act row by row, so the context rows can go before them
        x = x if self.targets_only else targets.of(x)
        return self.predictor_proj(self.predictor_norm(x)).view(*target_indices.shape, -1)

    def _sequences(
        self, context: Tensor, target_indices: Tensor, offsets: Tensor | None
    ) -> tuple[Layout, Selection]:  # fmt: skip
        """How the predictor's sequences lie, and where the target rows are in them."""
        _, blocks, length = target_indices.shape
        structure = (blocks, length) if self.shared_context else None
        tail = blocks * length if self.shared_context else length  # target rows of a sequence
        if offsets is None:
            return Layout(target_blocks=structure), Selection(context.shape[1], tail)
        starts = ops.sequence_offsets(offsets, blocks, length, self.shared_context)
        longest = len(self.predictor_pos_embed[0]) + tail  # a constant, unlike the longest context
        index = starts[1:, None] + torch.arange(-tail, 0, device=starts.device)
        return Layout(starts, longest, structure), Selection(index=index)


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
    **options: Any,
) -> Predictor:
    """Builds the predictor that goes with the encoder called `name` (its width and, unless given, its heads).

    Published: width 384; depth 6 for tiny to base, 12 for large and huge, 16 for giant (I-JEPA, C-JEPA section 4.1).
    `options` are those of `Predictor`.

    Raises UserError for an unknown name or sizes that do not divide.
    """
    encoder = encoder_shape(name)
    shape = VitShape(width, depth, heads or encoder.heads)
    return Predictor(shape, encoder.width, _grid(image_size, patch_size), **options)


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
