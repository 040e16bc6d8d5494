"""The CUDA mask sampler of csrc/mask_sampler.cu: built by nvcc for the GPUs at hand at first use, loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cjepa_fast.native import host as native
from cjepa_fast.reference.masks import MaskSpec, Mode

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=c++17")
_SHARED = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "static")  # static: torch brings a runtime of its own
_BUILD_TIMEOUT_S = 300


class DeviceMasks(NamedTuple):
    """`reference_masks.MaskArrays` as tensors on the GPU; only in faithful mode do they differ, in `context`."""

    context: torch.Tensor  # int16 [B, Kc]; packed [cap]; faithful [B, context_h context_w], -1 behind counts[b] patches
    target: torch.Tensor  # int16 [B, M, Kt]
    counts: torch.Tensor  # int32 [B]
    offsets: torch.Tensor | None  # int32 [B + 1], packed
    image_of: torch.Tensor | None  # int32 [cap], packed
    inverse: torch.Tensor | None  # int16 [B, N]
    union: torch.Tensor | None  # int16 [union_cap]
    union_offsets: torch.Tensor | None  # int32 [B + 1]
    target_slot: torch.Tensor | None  # int16 [B, M, Kt]
    shortest: torch.Tensor | None  # int32 [], faithful: the batch minimum of counts, to which the host may cut context


class _Outputs(ctypes.Structure):
    """`MaskOutputs` of csrc/mask_spec.h: null for what is not wanted."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in DeviceMasks._fields[:-1])


class _Unavailable(Exception):
    """No library; the message says why."""


def sources() -> list[Path]:
    """What nvcc compiles."""
    return sorted((native.PACKAGE / "csrc").glob("*.cu"))


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, else of $PATH, else of the usual place."""
    homes = [os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=home and str(Path(home, "bin"))) for home in homes if home != "")
    return next((path for path in found if path), None)


def _targets(capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """nvcc's options for code of these GPUs, and for PTX of the newest, which later ones can compile."""
    names = [f"{major}{minor}" for major, minor in sorted(set(capabilities))]
    pairs = [*((name, f"sm_{name}") for name in names), (names[-1], f"compute_{names[-1]}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in pairs]


def source_hash(version: str, targets: Sequence[str]) -> str:
    """Sixteen hex digits that change with any source or flag, the architectures and the version of nvcc."""
    digest = hashlib.sha256(" ".join((*FLAGS, *_SHARED, *targets, version)).encode())
    for path in sorted([*sources(), *(native.PACKAGE / "csrc").glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        error = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[0]
        raise _Unavailable(f"{command[0]} failed: {error}")
    return done.stdout


def build(capabilities: Sequence[tuple[int, int]]) -> Path:
    """The library for GPUs of these compute capabilities, from the user's cache or compiled into it.

    Several processes may build, as each renames a complete file into place. Raises _Unavailable.
    """
    from cjepa_fast.cache import cache_directory

    if (nvcc := find_nvcc()) is None:
        raise _Unavailable("no nvcc was found in $CUDA_HOME/bin or on the PATH")
    targets = _targets(capabilities)
    source = source_hash(_run([nvcc, "--version"]), targets)
    path = cache_directory() / f"native-cuda-{source}-{sys.platform}-{platform.machine()}.so"
    if path.exists():
        try:
            open_library(path)
            return path
        except (OSError, AttributeError) as error:
            log.info("%s cannot be loaded (%s): built anew", path, error)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder, path.name)
            define, files = f'-DCJEPA_SOURCE_HASH="{source}"', [str(file) for file in sources()]
            _run([nvcc, *FLAGS, *_SHARED, *targets, define, *files, "-o", str(output)])
            os.replace(output, path)
    except OSError as error:
        raise _Unavailable(f"the library could not be built in {path.parent}: {error}") from error
    log.info("built the CUDA mask sampler with %s: %s", nvcc, path)
    return path


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions typed; OSError or AttributeError if it is none."""
    library = ctypes.CDLL(str(path))
    pointer, integer, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.cjepa_cuda_source_hash.restype = ctypes.c_char_p
    library.cjepa_cuda_error.argtypes, library.cjepa_cuda_error.restype = (integer,), ctypes.c_char_p
    library.cjepa_cuda_check.argtypes, library.cjepa_cuda_check.restype = (integer,), integer
    library.cjepa_mask_workspace_bytes.argtypes, library.cjepa_mask_workspace_bytes.restype = (length,), length
    library.cjepa_sample_masks_cuda.argtypes = (
        *(pointer, pointer, pointer, length, pointer),  # spec, step, ids, n, outputs
        *(pointer, pointer, pointer, integer, pointer),  # shortest, status, workspace, device, stream
    )
    library.cjepa_sample_masks_cuda.restype = integer
    return library


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    import torch

    if not sources():
        return f"{native.PACKAGE / 'csrc'} holds no CUDA sources"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    devices = range(torch.cuda.device_count())
    try:
        path = build([torch.cuda.get_device_capability(device) for device in devices])
        library = open_library(path)
    except (_Unavailable, OSError, AttributeError) as reason:
        return str(reason)
    for device in devices:
        with torch.cuda.device(device):
            if (error := library.cjepa_cuda_check(device)) != 0:
                return f"{path} does not run on GPU {device}: {library.cjepa_cuda_error(error).decode()}"
    return library


def why_unavailable() -> str | None:
    """None if the library is loaded (built first if need be), else the reason in one line."""
    found = _load()
    return found if isinstance(found, str) else None


def _library() -> ctypes.CDLL:
    found = _load()
    assert not isinstance(found, str), found
    return found


def new_workspace(images: int, device: torch.device | str) -> torch.Tensor:
    """Memory for calls with up to `images` ids that never overlap in time, such as those of one stream."""
    import torch

    return torch.zeros(_library().cjepa_mask_workspace_bytes(images), dtype=torch.uint8, device=device)


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
    """As `reference_masks.sample`, bit for bit, in one launch on the current stream and without waiting for it.

    A captured CUDA graph may be replayed with other values in `step` and `ids`; the block sizes are those of `spec`.

    Args:
        spec: its `step` is not used.
        step: one integer of 32 or 64 bits; its low 32 bits are the step.
        ids: int64 [B], contiguous, on the GPU, as all of these.
        workspace: from `new_workspace`; one is made and zeroed if it is None, which costs a launch.
        status: int32, one element: set to 2 if an image found no context (its context is empty), else left alone.

    Raises:
        ValueError: a tensor of the wrong dtype, shape or device, or not contiguous.
        RuntimeError: an impossible spec, or what CUDA says.
    """
    import torch

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
        return launch(_library(), spec, step, ids, inverse, union, workspace, status, ids.device.index, stream)


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
    """`sample_masks` without its checks, for any build of the source and the memory that it can reach."""
    import torch

    batch, patches = len(ids), spec.height * spec.width
    if workspace.numel() < (need := library.cjepa_mask_workspace_bytes(batch)):
        raise ValueError(f"workspace has {workspace.numel()} bytes: {batch} images need {need}")
    packed, faithful = spec.mode == Mode.PACKED, spec.mode == Mode.FAITHFUL
    target_shape = (batch, spec.num_targets, spec.target_h * spec.target_w)
    context_shape = (batch, spec.context_h * spec.context_w if faithful else spec.keep)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=ids.device)

    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    masks = DeviceMasks(
        context=empty(torch.int16, spec.cap) if packed else empty(torch.int16, *context_shape),
        target=empty(torch.int16, *target_shape),
        counts=empty(torch.int32, batch),
        offsets=empty(torch.int32, batch + 1) if packed else None,
        image_of=empty(torch.int32, spec.cap) if packed else None,
        inverse=empty(torch.int16, batch, patches) if inverse else None,
        union=empty(torch.int16, spec.union_cap) if union else None,
        union_offsets=empty(torch.int32, batch + 1) if union else None,
        target_slot=empty(torch.int16, *target_shape) if union else None,
        shortest=empty(torch.int32) if faithful else None,
    )
    outputs = _Outputs(*(address(tensor) for tensor in masks[:-1]))
    error = library.cjepa_sample_masks_cuda(
        *(ctypes.byref(native._Spec(**spec._asdict())), address(step), address(ids), batch),
        *(ctypes.byref(outputs), address(masks.shortest), address(status), address(workspace), device, stream),
    )
    if error == 1:
        raise RuntimeError(f"impossible block sizes at {spec}")
    if error != 0:
        raise RuntimeError(f"the CUDA mask sampler failed: {library.cjepa_cuda_error(error).decode()}")
    return masks
