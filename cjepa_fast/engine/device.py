"""The device of a process: choice, name, memory, peak rate, and the C library's allocator."""

from __future__ import annotations

import ctypes
import platform

import torch

from cjepa_fast.errors import UserError

# Dense bf16 products with fp32 accumulation, TFLOP/s of NVIDIA's data sheets, by a part of torch's name for the GPU.
_PEAK_TFLOP_S = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """Return the device of this process: "cuda" must exist, "auto" takes a GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda asked for, but torch sees no GPU; use auto, or a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--nproc-per-node: process {local_rank + 1} has no GPU, torch sees {found}; start {found}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def memory_gb(device: torch.device) -> float | None:
    """Return a GPU's memory in 10^9 bytes; None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None


def peak_tflop_s(device: torch.device) -> float | None:
    """Return the GPU's peak rate of dense bf16 products in TFLOP/s; None on a CPU or for a GPU not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAK_TFLOP_S.items() if part in name), None)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; return whether there is a glibc.

    glibc returns large activations to the system, and each new page then costs a fault: up to a seventh of a ViT-S step
    on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-1, 2**31 - 1), (-3, 2**31 - 1), (-2, 2**28)):  # trim and mmap thresholds, top pad
        mallopt(parameter, value)
    return True
