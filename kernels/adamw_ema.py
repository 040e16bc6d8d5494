"""AdamW, the averages (EMA) of the parameters and rounded copies of both, for many tensors in one pass.

    m = m + (1 - b1) (g - m)        v = v + (1 - b2) (g^2 - v)
    p = p - lr (wd p + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps))
    e = e + (1 - momentum) (p - e)

Bytes per element: 28 (read p, g, m, v; write p, m, v; two less for a 16-bit g), 8 more where there is an average, and 2
for each copy: see `bytes_per_parameter`.

Two launches. The first, one lane per tensor, counts the step, and computes seven fp32 numbers per tensor from the step
and the hyperparameters, all on the device. It computes in fp64, as torch does on the host, because 1 - b2^t and
1 - momentum lose their digits in fp32. The second updates the tensors in chunks. Counting needs a launch of its own, as
all programs of a tensor read its step.

Sources: Loshchilov & Hutter, ICLR 2019 (arXiv 1711.05101), algorithm 2; torch.lerp for the form of the averages.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# of a tensor: addresses of p, g, m, v, e, the copies of p and e (0: none) and the step; number of elements
COLUMNS = tl.constexpr(9)
HYPERPARAMETERS = tl.constexpr(6)  # of a group: lr, weight decay, b1, b2, eps, momentum
COEFFICIENTS = tl.constexpr(7)  # of a tensor: lr wd, lr / (1 - b1^t), 1 / sqrt(1 - b2^t), eps, 1 - b1, 1 - b2, 1 - m
LANES: dict[str, Any] = {"BLOCK": 128, "num_warps": 4}
# 16 bytes of every fp32 array per thread keep all arrays in one layout. With 32, arrays beside a 16-bit one change
# layout through shared memory. By construction; not yet tuned on a GPU.
TILE: dict[str, Any] = {"BLOCK": 1024, "num_warps": 8}
TYPES: dict[torch.dtype | None, Any] = {
    None: None, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip


@triton.jit
def _lerp(a, b, weight):
    """Compute a + weight (b - a) as torch.lerp rounds: one fused multiply-add, from the nearer end."""
    return tl.fma(tl.where(weight < 0.5, weight, weight - 1), b - a, tl.where(weight < 0.5, a, b))


@triton.jit(do_not_specialize=["tensors"])
def _coefficients_kernel(
    addresses,  # [tensors, COLUMNS] int64
    groups,  # [tensors] int32: rows of the hyperparameters
    hyperparameters,  # [groups, HYPERPARAMETERS] fp64
    coefficients,  # [tensors, COEFFICIENTS] fp32
    tensors,
    BLOCK: tl.constexpr,
):
    """Count the steps and compute the coefficients of BLOCK tensors, a lane each."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_t < tensors
    p_step = tl.load(addresses + o_t * COLUMNS + 7, mask=mask).to(tl.pointer_type(tl.float32))
    b_step = tl.load(p_step, mask=mask, other=0.0) + 1
    tl.store(p_step, b_step, mask=mask)

    p_hyper = hyperparameters + tl.load(groups + o_t, mask=mask, other=0) * HYPERPARAMETERS
    b_lr, b_decay = tl.load(p_hyper, mask=mask, other=0.0), tl.load(p_hyper + 1, mask=mask, other=0.0)
    b_beta1, b_beta2 = tl.load(p_hyper + 2, mask=mask, other=0.5), tl.load(p_hyper + 3, mask=mask, other=0.5)
    b_eps, b_momentum = tl.load(p_hyper + 4, mask=mask, other=0.0), tl.load(p_hyper + 5, mask=mask, other=1.0)
    b_step = b_step.to(tl.float64)
    p_out = coefficients + o_t * COEFFICIENTS
    tl.store(p_out, (b_lr * b_decay).to(tl.float32), mask=mask)
    tl.store(p_out + 1, (b_lr / (1 - tl.exp2(b_step * tl.log2(b_beta1)))).to(tl.float32), mask=mask)
    tl.store(p_out + 2, (1 / tl.sqrt(1 - tl.exp2(b_step * tl.log2(b_beta2)))).to(tl.float32), mask=mask)
    tl.store(p_out + 3, b_eps.to(tl.float32), mask=mask)
    tl.store(p_out + 4, (1 - b_beta1).to(tl.float32), mask=mask)
    tl.store(p_out + 5, (1 - b_beta2).to(tl.float32), mask=mask)
    tl.store(p_out + 6, (1 - b_momentum).to(tl.float32), mask=mask)


@triton.jit
def _move(
    a_p, a_g, a_m, a_v, a_e, a_pc, a_ec, p_coefficient, start, left,
    ALIGNED: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements from `start` on, of which `left` exist; ALIGNED: all exist, 16 bytes at a time."""
    if ALIGNED:
        o_n = tl.arange(0, BLOCK)
        mask = tl.full([BLOCK], True, tl.int1)
    else:  # in two dimensions: a lane's elements are 256 apart, so that lanes access neighbours
        o_n = tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
        mask = o_n < left
    p_p = a_p.to(tl.pointer_type(tl.float32)) + start
    p_g = a_g.to(tl.pointer_type(GRAD)) + start  # pyright: ignore[reportArgumentType]
    p_m = a_m.to(tl.pointer_type(tl.float32)) + start
    p_v = a_v.to(tl.pointer_type(tl.float32)) + start
    p_e = a_e.to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        p_p, p_g, p_m = tl.multiple_of(p_p, 16), tl.multiple_of(p_g, 16), tl.multiple_of(p_m, 16)
        p_v, p_e = tl.multiple_of(p_v, 16), tl.multiple_of(p_e, 16)
    m_e = mask & (a_e != 0)

    b_p = tl.load(p_p + o_n, mask=mask)
    b_g = tl.load(p_g + o_n, mask=mask).to(tl.float32)
    b_m = tl.load(p_m + o_n, mask=mask)
    b_v = tl.load(p_v + o_n, mask=mask)
    b_e = tl.load(p_e + o_n, mask=m_e)

    b_m = _lerp(b_m, b_g, tl.load(p_coefficient + 4))
    b_v = _lerp(b_v, b_g * b_g, tl.load(p_coefficient + 5))
    b_denominator = tl.fma(tl.sqrt_rn(b_v), tl.load(p_coefficient + 2), tl.load(p_coefficient + 3))
    b_update = tl.div_rn(tl.load(p_coefficient + 1) * b_m, b_denominator)
    b_p -= tl.fma(tl.load(p_coefficient), b_p, b_update)
    b_e = _lerp(b_e, b_p, tl.load(p_coefficient + 6))

    tl.store(p_p + o_n, b_p, mask=mask)
    tl.store(p_m + o_n, b_m, mask=mask)
    tl.store(p_v + o_n, b_v, mask=mask)
    tl.store(p_e + o_n, b_e, mask=m_e)
    if COPY is not None:
        p_pc = a_pc.to(tl.pointer_type(COPY)) + start
        p_ec = a_ec.to(tl.pointer_type(COPY)) + start
        if ALIGNED:
            p_pc, p_ec = tl.multiple_of(p_pc, 16), tl.multiple_of(p_ec, 16)
        tl.store(p_pc + o_n, b_p.to(COPY), mask=mask & (a_pc != 0))
        tl.store(p_ec + o_n, b_e.to(COPY), mask=mask & (a_ec != 0))


@triton.jit
def _update_kernel(
    addresses,  # [tensors, COLUMNS] int64
    chunks,  # [programs, 2] int32: a tensor and which chunk of it
    coefficients,  # [tensors, COEFFICIENTS] fp32
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK elements of one tensor."""
    p_chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    i_t = tl.load(p_chunk)
    p_row, p_coefficient = addresses + i_t * COLUMNS, coefficients + i_t * COEFFICIENTS
    start = tl.load(p_chunk + 1).to(tl.int64) * BLOCK
    a_p, a_g, a_m, a_v = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 3)
    a_e, a_pc, a_ec = tl.load(p_row + 4), tl.load(p_row + 5), tl.load(p_row + 6)
    left = tl.load(p_row + 8) - start
    # 16 bytes at a time where possible; shards and gradients of FSDP2 may begin anywhere
    if (left >= BLOCK) & ((a_p | a_g | a_m | a_v | a_e | a_pc | a_ec) % 16 == 0):
        _move(a_p, a_g, a_m, a_v, a_e, a_pc, a_ec, p_coefficient, start, left, True, GRAD, COPY, BLOCK)
    else:
        _move(a_p, a_g, a_m, a_v, a_e, a_pc, a_ec, p_coefficient, start, left, False, GRAD, COPY, BLOCK)


def update(
    addresses: tuple[int, ...], sizes: tuple[int, ...], grad_types: tuple[torch.dtype, ...],
    copy_type: torch.dtype | None, groups: tuple[int, ...], hyperparameters: Tensor,
) -> None:  # fmt: skip
    """Take one step for T tensors that the caller has checked and keeps alive.

    Args:
        addresses: of all p, then all g, and so on through the first eight columns of the table: 8 T integers.
        sizes: numbers of elements [T].
        grad_types: fp32 or bf16 [T]; one launch for each type that occurs.
        copy_type: type of the copies, None if there are none.
        groups: rows of `hyperparameters` [T].
        hyperparameters: [groups, HYPERPARAMETERS] fp64, on the device where everything is.

    In a CUDA graph the addresses must be those of an earlier step: capturing cannot copy tables to the device.
    """
    device, count = hyperparameters.device, len(sizes)
    table = _table(device, addresses, sizes)
    rows = _rows(device, groups)
    work = []
    for grad_type in sorted(set(grad_types), key=str):
        theirs = (size if other == grad_type else 0 for size, other in zip(sizes, grad_types, strict=True))
        work.append((grad_type, _chunks(device, tuple(theirs))))
    coefficients = torch.empty(count, COEFFICIENTS.value, dtype=torch.float32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append((table, rows, work))
    with torch.cuda.device_of(hyperparameters):
        programs = -(-count // LANES["BLOCK"])
        _coefficients_kernel[(programs,)](table, rows, hyperparameters, coefficients, count, **LANES)
        for grad_type, chunks in work:
            if len(chunks):
                types: dict[str, Any] = {"GRAD": TYPES[grad_type], "COPY": TYPES[copy_type]}
                _update_kernel[(len(chunks),)](table, chunks, coefficients, **types, **TILE)


_captured: list[Any] = []  # never freed: a CUDA graph reads its tables, and its end is unknown here


# The arguments determine a table, so a cached one is never stale. Gradients may move from step to step.
@functools.lru_cache(maxsize=32)
def _table(device: torch.device, addresses: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Return the table of addresses [T, COLUMNS] int64."""
    return _to(device, torch.tensor((*addresses, *sizes)).view(COLUMNS.value, -1).T.contiguous())


@functools.lru_cache(maxsize=32)
def _rows(device: torch.device, groups: tuple[int, ...]) -> Tensor:
    """Return the groups [T] int32."""
    return _to(device, torch.tensor(groups, dtype=torch.int32))


@functools.lru_cache(maxsize=8)
def _chunks(device: torch.device, sizes: tuple[int, ...]) -> Tensor:
    """Return [programs, 2] int32: a tensor, and the chunk of it."""
    counts = torch.tensor([-(-size // TILE["BLOCK"]) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(counts)
    firsts = (counts.cumsum(0) - counts)[tensors]
    return _to(device, torch.stack([tensors, torch.arange(len(tensors)) - firsts], dim=1).int())


def _to(device: torch.device, values: Tensor) -> Tensor:
    """Copy to the device; to a GPU from pinned memory, so that the host need not wait."""
    if device.type != "cuda":
        return values
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "adamw_ema: a tensor has moved since the last step before the capture; take one step before it and keep "
            "the gradients' memory: zero_grad(set_to_none=False)"
        )
    return values.pin_memory().to(device, non_blocking=True)


def bytes_per_parameter(grad_type: torch.dtype = torch.float32, *, average: bool = False, copies: int = 0) -> int:
    """Return the bytes of global memory that a step reads and writes for an element with `copies` 16-bit copies.

    Tables add 100 bytes for a program of 1024 elements.
    """
    return 24 + grad_type.itemsize + 8 * average + 2 * copies


def _aot() -> list[dict[str, Any]]:
    """List the shipped tiles for ahead-of-time compilation; ":16" marks multiples of 16."""
    table = {"addresses": "*i64:16", "coefficients": "*fp32:16"}
    tiles: list[dict[str, Any]] = [
        dict(
            name="coefficients", kernel=_coefficients_kernel, constants=LANES,
            signature={**table, "groups": "*i32:16", "hyperparameters": "*fp64:16", "tensors": "i32"},
        )
    ]  # fmt: skip
    for grad in (tl.float32, tl.bfloat16):
        for copy in (None, tl.bfloat16, tl.float16):
            tiles.append(
                dict(
                    name=f"update grad {grad}, copy {copy}", kernel=_update_kernel,
                    signature={**table, "chunks": "*i32:16"}, constants={"GRAD": grad, "COPY": copy, **TILE},
                )
            )  # fmt: skip
    return tiles


AOT = _aot()
