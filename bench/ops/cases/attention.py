"""Self-attention between the packed projection and the next one, for the sequences that a training step has.

With X the bytes of one of q, k, v, o over all sequences, D the width and S the sum of queries times keys over them:
    forward   4 X (q, k, v, o),   4 S D FLOP
    backward  8 X (q, k, v, o, do, dq, dk, dv),   10 S D FLOP: five products, of which one repeats the forward's
Where queries are fewer than keys, each kind counts by its own rows. Statistics of the rows, below 1 %, are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.cases import UNINTERPRETED, Case, Variant, both_directions, compiled
from bench.timing import Inputs
from cjepa_fast import ops

IMPLS = ("triton", "sdpa", "xformers", "eager")
PINNED = {  # torch's sdpa, held to one of its kernels
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# what, tokens, head width, heads, sequences: 128 images, four target blocks each in the predictor
POINTS = [
    ("predictor B", 84, 32, 12, 512),
    ("target B", 196, 64, 12, 128),
    ("predictor L", 84, 24, 16, 512),
    ("predictor H", 112, 24, 16, 512),
    ("target H", 256, 80, 16, 128),
    ("context B", 51, 64, 12, 128),
    ("predictor S", 84, 64, 6, 512),
]
# 14x14 patches: mean and deviation of the length of an uncut context, tokens of a target block
CONTEXT_MEAN, CONTEXT_STD, TARGET = 82, 13, 33


def attend(qkv: Tensor, heads: int, impl: str, **options: Any) -> Tensor:
    return by(impl, qkv, heads, **options)


def attend_packed(qkv: Tensor, offsets: Tensor, heads: int, impl: str, max_length: int) -> Tensor:
    return by(impl, qkv, heads, offsets=offsets, max_length=max_length)


def attend_from(query: Tensor, kv: Tensor, heads: int, impl: str) -> Tensor:
    return by(impl, kv, heads, query=query)


def by(impl: str, qkv: Tensor, heads: int, **options: Any) -> Tensor:
    """Compute `ops.attention` by one of its back-ends, or by a rival that it does not offer."""
    if impl == "varlen":
        return varlen(qkv, heads, **options)
    if impl in PINNED:
        with sdpa_kernel(PINNED[impl]):
            return ops.attention(qkv, heads, impl="sdpa", **options)
    return ops.attention(qkv, heads, impl=impl, **options)


def varlen(
    qkv: Tensor, heads: int, *, query: Tensor | None = None, offsets: Tensor | None = None, max_length: int = 0
) -> Tensor:
    """Compute attention by torch.nn.attention.varlen; sequences of one length count as packed."""
    from torch.nn.attention.varlen import varlen_attn

    def starts(tokens: Tensor) -> tuple[Tensor, int]:
        if offsets is not None:
            return offsets, max_length
        batch, length = tokens.shape[:2]
        return torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * length, length

    parts = qkv.chunk(3, dim=-1) if query is None else (query, *qkv.chunk(2, dim=-1))
    q, k, v = (part.reshape(-1, heads, part.shape[-1] // heads) for part in parts)
    (q_starts, q_longest), (k_starts, k_longest) = starts(parts[0]), starts(parts[1])
    out = varlen_attn(q, k, v, q_starts, k_starts, q_longest, k_longest)
    assert isinstance(out, Tensor)
    return out.view(parts[0].shape)


def obstacle(impl: str, device: str, structured: bool) -> str | None:
    """Return why an implementation is not timed."""
    if impl == "triton" and device == "cpu":
        return UNINTERPRETED
    if impl == "varlen" and structured:
        return "it takes no target blocks"
    return None


def compare(
    name: str, function: Any, inputs: Any, rows: tuple[int, int], pairs: int, width: int, device: str,
    dtype: torch.dtype, **options: Any,
) -> Iterator[Case]:  # fmt: skip
    """The two cases of a function of `impl`; `rows` are those of queries and of keys, `pairs` is S above."""
    eager = functools.partial(function, impl="eager", **options)
    variants = [
        Variant(
            name=impl, call=functools.partial(function, impl=impl, **options),
            role="ours" if impl == "triton" else "rival", obstacle=obstacle(impl, device, "target_blocks" in options),
        )
        for impl in (*IMPLS, *PINNED, "varlen")
    ]  # fmt: skip
    size = sum(rows) * width * dtype.itemsize  # q and o count by the queries, k and v by the keys
    yield from both_directions(
        name, [*variants, compiled(eager)], inputs, eager, (2 * size, 4 * pairs * width), (4 * size, 10 * pairs * width)
    )


def cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    divisor = 64 if quick else 1
    for what, tokens, head_dim, heads, sequences in POINTS[:2] if quick else POINTS:
        sequences //= divisor
        width = heads * head_dim
        yield from compare(
            f"{what} n={tokens} d={head_dim} h={heads} B={sequences}", attend,
            functools.partial(random, (sequences, tokens, 3 * width), device=device, dtype=dtype),
            (sequences * tokens, sequences * tokens), sequences * tokens**2, width, device, dtype, heads=heads,
        )  # fmt: skip

    head_dim, heads, images, blocks = 32, 12, 128 // divisor, 4
    width = heads * head_dim
    for what, extra, sequences in (("context", 0, images), ("predictor", TARGET, images * blocks)):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randn(sequences, generator=generator) * CONTEXT_STD + CONTEXT_MEAN
        lengths = lengths.round().int().clamp(37, 130) + extra
        offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
        rows, longest = int(offsets[-1]), int(lengths.max())

        def packed(rows: int = rows, offsets: Tensor = offsets) -> Inputs:
            return *random((rows, 3 * width), device=device, dtype=dtype), offsets

        yield from compare(
            f"packed {what} B d={head_dim} h={heads} B={sequences} rows={rows} longest={longest}", attend_packed,
            packed, (rows, rows), int((lengths.long() ** 2).sum()), width, device, dtype, heads=heads,
            max_length=longest,
        )  # fmt: skip

    context, sequences = 51, images * blocks
    yield from compare(
        f"last predictor block B nq={TARGET} n={context + TARGET} d={head_dim} h={heads} B={sequences}", attend_from,
        functools.partial(
            random, (sequences, TARGET, width), (sequences, context + TARGET, 2 * width), device=device, dtype=dtype
        ),
        (sequences * TARGET, sequences * (context + TARGET)), sequences * TARGET * (context + TARGET), width, device,
        dtype, heads=heads,
    )  # fmt: skip
    tokens = context + blocks * TARGET
    yield from compare(
        f"shared context B n={tokens} M={blocks} Kt={TARGET} d={head_dim} h={heads} B={images}", attend,
        functools.partial(random, (images, tokens, 3 * width), device=device, dtype=dtype),
        (images * tokens, images * tokens), images * (context**2 + blocks * TARGET * (context + TARGET)), width,
        device, dtype, heads=heads, target_blocks=(blocks, TARGET),
    )  # fmt: skip


def random(*shapes: tuple[int, ...], device: str, dtype: torch.dtype) -> Inputs:
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
