"""The CUDA library: the mask sampler of csrc/mask_sampler.cu, built by nvcc for the GPUs at hand."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cjepa_fast.native import build
from cjepa_fast.native.build import FLAGS
from cjepa_fast.native.host import POINTER, Outputs, Spec, empty_outputs
from cjepa_fast.reference.masks import MaskSpec, Mode

LINK_FLAGS = ("-Xcompiler", "-fPIC", "-cudart", "static")  # static: torch brings a runtime of its own
FUNCTIONS: build.Functions = {
    "cjepa_cuda_error": (ctypes.c_char_p, ctypes.c_int),
    "cjepa_cuda_check": (ctypes.c_int, ctypes.c_int),
    "cjepa_mask_workspace_bytes": (ctypes.c_int64, ctypes.c_int64),
    "cjepa_sample_masks_cuda": (
        *(ctypes.c_int, POINTER, POINTER, POINTER, ctypes.c_int64, POINTER),  # result; spec, step, ids, n, outputs
        *(POINTER, POINTER, POINTER, ctypes.c_int, POINTER),  # shortest, status, workspace, device, stream
    ),
}


class DeviceMasks(NamedTuple):
    """The fields of `reference.masks.MaskArrays` as tensors on the GPU, and the shortest context.

    One field differs: in faithful mode `context` is [B, context_h context_w], and -1 follows the counts[b] patches of
    image b.
    """

    context: torch.Tensor
    target: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor | None
    image_of: torch.Tensor | None
    inverse: torch.Tensor | None
    union: torch.Tensor | None
    union_offsets: torch.Tensor | None
    target_slot: torch.Tensor | None
    shortest: torch.Tensor | None  # int32 [], faithful: least of counts, the length to which the host may cut contexts


def find_nvcc() -> str | None:
    """Return the path of nvcc in $CUDA_HOME, else in $PATH, else in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=home and str(Path(home, "bin"))) for home in homes if home != "")
    return next((path for path in found if path), None)


def targets(capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """Return nvcc's options for code of these GPUs, and for PTX of the newest, which later GPUs can compile."""
    names = [f"{major}{minor}" for major, minor in sorted(set(capabilities))]
    pairs = [*((name, f"sm_{name}") for name in names), (names[-1], f"compute_{names[-1]}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in pairs]


def load(capabilities: Sequence[tuple[int, int]]) -> ctypes.CDLL:
    """Return the library for GPUs of these compute capabilities, built at first use. Raises `build.Unavailable`."""
    if (nvcc := find_nvcc()) is None:
        raise build.Unavailable("no nvcc was found in $CUDA_HOME/bin or on the PATH")
    options, version = (*FLAGS, *LINK_FLAGS, *targets(capabilities)), build.run([nvcc, "--version"])
    return build.load("native-cuda", "cu", options, lambda: [nvcc], FUNCTIONS, version)


def _load_for_all_gpus() -> ctypes.CDLL:
    if not torch.cuda.is_available():
        raise build.Unavailable("torch sees no CUDA GPU")
    devices = range(torch.cuda.device_count())
    found = load([torch.cuda.get_device_capability(device) for device in devices])
    for device in devices:
        with torch.cuda.device(device):
            if (error := found.cjepa_cuda_check(device)) != 0:
                reason = found.cjepa_cuda_error(error).decode()
                raise build.Unavailable(f"the CUDA library does not run on GPU {device}: {reason}")
    return found


LIBRARY = build.Library(_load_for_all_gpus)
why_unavailable = LIBRARY.why_unavailable


def new_workspace(images: int, device: torch.device | str) -> torch.Tensor:
    """Return memory for calls with up to `images` ids that never overlap in time, such as the calls of one stream."""
    return torch.zeros(LIBRARY().cjepa_mask_workspace_bytes(images), dtype=torch.uint8, device=device)


def sample_masks(
    spec: MaskSpec,
    step: torch.Tensor,
    ids: torch.Tensor,
    *,
    inverse: bool = False,
    union: bool = False,
    workspace: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> DeviceMasks:
    """Return the masks of `reference.masks.sample`, bit for bit, in one launch on the current stream, without waiting.

    A captured CUDA graph may be replayed with other values in `step` and `ids`; the block sizes remain those of `spec`.

    Args:
        spec: its `step` is not used.
        step: one integer of 32 or 64 bits on the GPU; its low 32 bits are the step.
        ids: int64 [B], contiguous, on the GPU.
        workspace: from `new_workspace`; None makes and zeroes one, which costs a launch.
        status: int32, one element on the GPU: set to 2 if an image found no context (its context is then empty), else
            left alone.

    Raises:
        ValueError: a tensor has the wrong dtype, shape or device, or is not contiguous.
        RuntimeError: the spec is impossible, or CUDA reports an error.
    """
    _check("ids", ids, ids.device, (torch.int64,), "B")
    _check("step", step, ids.device, (torch.int32, torch.uint32, torch.int64), "1")
    if workspace is not None:
        _check("workspace", workspace, ids.device, (torch.uint8,), "bytes")
    if status is not None:
        _check("status", status, ids.device, (torch.int32,), "1")
    if ids.device.type != "cuda":
        raise ValueError(f"ids is on {ids.device}: put it on a CUDA GPU")
    workspace = new_workspace(len(ids), ids.device) if workspace is None else workspace
    stream = torch.cuda.current_stream(ids.device).cuda_stream
    with torch.cuda.device(ids.device):
        return launch(LIBRARY(), spec, step, ids, inverse, union, workspace, status, ids.device.index, stream)


def _check(name: str, tensor: torch.Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, ids on {device}: put both on one GPU")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}: pass {' or '.join(str(dtype) for dtype in dtypes)}")
    if tensor.numel() == 0 or (tensor.numel() != 1 if shape == "1" else tensor.ndim != 1):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: pass [{shape}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}: pass a contiguous tensor")


def launch(
    library: ctypes.CDLL,
    spec: MaskSpec,
    step: torch.Tensor,
    ids: torch.Tensor,
    inverse: bool,
    union: bool,
    workspace: torch.Tensor,
    status: torch.Tensor | None,
    device: int,
    stream: int,
) -> DeviceMasks:
    """Return the masks of `sample_masks`, without its checks, from any build of the source."""
    batch = len(ids)
    if workspace.numel() < (need := library.cjepa_mask_workspace_bytes(batch)):
        raise ValueError(f"workspace has {workspace.numel()} bytes: {batch} images need {need}")

    def empty(shape: int | tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=ids.device)

    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    shortest = empty((), "int32") if spec.mode == Mode.FAITHFUL else None
    masks = DeviceMasks(*empty_outputs(spec, batch, inverse, union, empty), shortest=shortest)
    outputs = Outputs(*(address(tensor) for tensor in masks[:-1]))
    error = library.cjepa_sample_masks_cuda(
        *(ctypes.byref(Spec(*spec)), address(step), address(ids), batch),
        *(ctypes.byref(outputs), address(shortest), address(status), address(workspace), device, stream),
    )
    if error == 1:
        raise RuntimeError(f"impossible block sizes at {spec}")
    if error != 0:
        raise RuntimeError(f"the CUDA mask sampler failed: {library.cjepa_cuda_error(error).decode()}")
    return masks
