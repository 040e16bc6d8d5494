"""The choice among the back-ends of attention, and the checks of its arguments."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor

from cjepa_fast.errors import UserError
from cjepa_fast.ops._choice import announce, triton_obstacle

BACKENDS = ("triton", "sdpa", "xformers", "eager")
TRITON_HEAD_DIMS = (24, 32, 64, 80, 88, 128)

# Back-ends by time, forward and backward together in 16 bits, fastest first:
# {name of the GPU in torch: {(tokens, head width): back-ends}}. Each bucket of `TOKENS` holds sequences of up to that
# many keys. No GPU has been measured yet; `python -m bench.gpu` prints entries.
TOKENS = (32, 64, 96, 128, 192, 256, 512, 1024)
MEASURED: dict[str, dict[tuple[int, int], tuple[str, ...]]] = {}


def require_attention(
    impl: str, device_type: str, *, dtype: torch.dtype, head_dims: Iterable[int], length: int, packed: bool,
    structured: bool, compiled: bool,
) -> None:  # fmt: skip
    """Raise UserError if `impl` cannot run the attention of a network; to ask before a run, once for each network.

    Args:
        impl: as for `attention`; "auto" can always run.
        device_type: "cpu", "cuda", ...
        dtype: of the activations.
        head_dims: head widths d.
        length: of the longest sequence, as `attention` is promised.
        packed: sequences are packed, on the side of the queries or the keys.
        structured: sequences have target blocks.
        compiled: torch.compile traces the calls.
    """
    if impl not in ("auto", *BACKENDS):
        raise UserError(f"runtime.attention: unknown {impl!r}; known: auto, {', '.join(BACKENDS)}")
    if impl == "auto":
        return
    known = device_type == "cpu" and not compiled
    for head_dim in head_dims:
        if why := obstacle(impl, device_type, str(dtype), head_dim, bucket(length), packed, structured, known):
            raise UserError(f"runtime.attention: {impl} cannot run: {why}; use auto")


def bucket(length: int) -> int:
    """Return the bucket of `TOKENS` that holds a sequence, 0 for longer ones."""
    # comparisons only, so that a compiled program stays valid for a range of lengths
    return next((tokens for tokens in TOKENS if length <= tokens), 0)


def choose_attention(
    impl: str, device: str, index: int | None, dtype: str, head_dim: int, bucket: int, packed: bool, structured: bool,
    known: bool,
) -> str:  # fmt: skip
    """Return the back-end that runs a call, and log the choice once; raise UserError if `impl` cannot run.

    Args:
        index: of the GPU.
        bucket: the one of `TOKENS` that holds the longest sequence, 0 for longer ones.
        known: the host may read the lengths of packed sequences.
    """
    if impl not in ("auto", *BACKENDS):
        raise UserError(f"unknown impl {impl!r} for attention; known: auto, {', '.join(BACKENDS)}")

    def why_not(backend: str) -> str | None:
        return obstacle(backend, device, dtype, head_dim, bucket, packed, structured, known)

    if impl != "auto":
        if why := why_not(impl):
            raise UserError(f"impl={impl!r} cannot run attention: {why}; take another impl or 'auto'")
        choice, reason = impl, "asked for"
    elif device != "cuda":
        choice, reason = "eager" if why_not("sdpa") else "sdpa", f"the tensors are on {device}"
    else:
        name = gpu_name(index)
        measured = MEASURED.get(name, {}).get((bucket, head_dim), ()) if dtype != "torch.float32" else ()
        # sdpa would copy the context for each block
        default = ("triton", "sdpa", "eager") if packed or structured else ("sdpa",)
        choice = next(backend for backend in (*measured, *default) if why_not(backend) is None)
        if choice in measured:
            reason = f"the fastest measured on {name}"
        else:
            reason = f"no measurement for {name}"
            if choice != default[0]:
                reason += f"; {default[0]} cannot run: {why_not(default[0])}"
    form = ", ".join(word for word, holds in (("packed", packed), ("structured", structured)) if holds)
    announce(f"attention ({form})" if form else "attention", choice, reason)
    return choice


choose_attention._dynamo_marked_constant = True  # type: ignore[attr-defined] # see `_choice.choose`


@functools.cache
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def obstacle(
    backend: str, device: str, dtype: str, head_dim: int, bucket: int, packed: bool, structured: bool, known: bool
) -> str | None:
    """Return why a back-end cannot run; None if it can. Arguments as for `choose_attention`."""
    floats = ("torch.bfloat16", "torch.float16", "torch.float32")
    if backend == "eager":
        return None
    if backend == "sdpa":
        return "packed sequences would have to be padded" if packed and not known else None
    if backend == "triton":
        if why := triton_obstacle(device):
            return why
        if dtype not in floats:
            return f"dtype {dtype} is not fp32, bf16 or fp16"
        if head_dim not in TRITON_HEAD_DIMS:
            return f"head width {head_dim} is not among {', '.join(map(str, TRITON_HEAD_DIMS))}"
        return None if bucket else f"sequences are longer than {TOKENS[-1]} tokens"
    if packed and structured:
        return "packed sequences with target blocks would have to be taken apart"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device != "cuda":
        return f"the tensors are on {device}, not cuda"
    if dtype not in floats:
        return f"dtype {dtype} is not fp32, bf16 or fp16"
    if head_dim % 8:
        return f"head width {head_dim} is not a multiple of 8"
    return f"head width {head_dim} is over 256" if head_dim > 256 else None  # of the backward pass, on every GPU


def check(
    qkv: Tensor, heads: int, query: Tensor | None, offsets: Tensor | None, max_length: int | None,
    query_offsets: Tensor | None, max_query_length: int | None, target_blocks: tuple[int, int] | None,
) -> int:  # fmt: skip
    """Return the width D; raise ValueError for arguments of `attention` that do not fit together."""
    parts = 3 if query is None else 2
    width = qkv.shape[-1] // parts
    if heads < 1 or qkv.shape[-1] % (parts * heads):
        raise ValueError(f"the last dimension of qkv, {qkv.shape[-1]}, is not {parts} * {heads} heads * head width")
    if query is not None:
        if target_blocks is not None:
            raise ValueError("target_blocks cannot be combined with query: structured sequences are self-attention")
        if query.shape[-1] != width:
            raise ValueError(f"query {tuple(query.shape)} does not go with keys and values {tuple(qkv.shape)}")
        if (query.dtype, query.device) != (qkv.dtype, qkv.device):
            raise ValueError(
                f"query is {query.dtype} on {query.device}, keys and values are {qkv.dtype} on {qkv.device}"
            )
    elif query_offsets is not None:
        raise ValueError("query_offsets are given without query")
    sides = [("qkv", qkv, "offsets", offsets, "max_length", max_length)]
    if query is not None:
        sides.append(("query", query, "query_offsets", query_offsets, "max_query_length", max_query_length))
    batches = []
    for name, tokens, offsets_name, side_offsets, length_name, length in sides:
        if tokens.ndim != (3 if side_offsets is None else 2):
            wanted = "[B, K, width] without offsets" if side_offsets is None else "[T, width] with offsets"
            raise ValueError(f"{name} {tuple(tokens.shape)} is not {wanted}")
        if side_offsets is None:
            batches.append(tokens.shape[0])
            continue
        if side_offsets.dtype != torch.int32 or side_offsets.ndim != 1 or side_offsets.device != qkv.device:
            raise ValueError(
                f"{offsets_name} are {side_offsets.dtype} {tuple(side_offsets.shape)} on {side_offsets.device}, "
                f"not int32 [B + 1] on {qkv.device}"
            )
        if length is None or length < 0:
            raise ValueError(f"{offsets_name} need {length_name}, the longest sequence, got {length}")
        batches.append(side_offsets.shape[0] - 1)
    if batches[-1] != batches[0]:
        raise ValueError(f"qkv has {batches[0]} sequences, query {batches[-1]}")
    if target_blocks is not None:
        longest = qkv.shape[1] if offsets is None else max_length
        check_blocks(target_blocks, longest or 0)
    return width


def check_blocks(target_blocks: tuple[int, int], length: int) -> None:
    """Raise ValueError if target blocks do not fit into a sequence of `length` tokens."""
    blocks, block_length = target_blocks
    if blocks < 1 or block_length < 1 or blocks * block_length > length:
        raise ValueError(f"target_blocks {target_blocks} do not fit into sequences of {length} tokens")
