"""Checkpoints by torch.distributed.checkpoint (DCP): complete, checked and resumable, or absent.

A checkpoint is a folder `step-N` of DCP shards and a `manifest.json` with the CRC-32 of every file, as DCP itself would
load a flipped bit. Its name is `step-N.partial` until it is whole. DCP's `.metadata` is a pickle: resume only from run
directories you trust.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from cjepa_fast.distributed import world_size
from cjepa_fast.errors import UserError

logger = logging.getLogger("cjepa_fast")
MANIFEST = "manifest.json"


def training_state(networks: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every tensor that a step changes, by name, sharing memory with the live ones.

    Call `init_state` first where the optimizer has taken no step. Any optimizer will do whose state holds tensors.
    """
    state = {f"networks.{name}": tensor.detach() for name, tensor in networks.state_dict().items()}
    for name, parameter in networks.named_parameters():
        values = optimizer.state.get(parameter, {})
        state |= {f"optimizer.{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return state


@torch.no_grad()
def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer create its state, so that a checkpoint can be loaded into it: by a step with lr 0.

    The values are left for `load` to overwrite; weights stay.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def save(folder: Path, step: int, state: dict[str, Tensor], *, keep: int, extra: dict[str, Any]) -> Path:
    """Save `state` as folder/step-N, then remove all but the newest `keep` checkpoints. Collective.

    `extra`: JSON values for the manifest. Raises UserError if the disk refuses (full, read-only).
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    refusal, failure = f"{final}: checkpoint not written; free space or permissions?", ""
    try:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = _in_a_line(error)
    if _any_rank(bool(failure)):  # fail before DCP, where the other ranks would wait for this one
        raise UserError(f"{refusal} {failure}")
    try:
        _dcp(dcp.save, state, partial)
        if _rank() == 0:
            _commit(partial, final, step, extra)
    except (OSError, CheckpointException) as error:  # CheckpointException derives from BaseException
        failure = _in_a_line(error)
    if _any_rank(bool(failure)):
        raise UserError(f"{refusal} {failure}")
    for old in _steps(folder)[:-keep] if _rank() == 0 else ():
        try:
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("old checkpoint %s cannot be removed: %s", old, _in_a_line(error))
    return final


def require(folder: Path) -> None:
    """Raise UserError if `folder` holds no checkpoint."""
    if not _steps(folder):
        raise UserError(f"{folder}: no checkpoint there; remove the folder or name another, without --resume")


def load(folder: Path, state: dict[str, Tensor]) -> tuple[int, dict[str, Any]]:
    """Load the newest valid checkpoint of `folder` into the tensors of `state`, in place, for any world size.

    Damaged checkpoints are named and skipped. Returns the step and the manifest's `extra`.
    Raises UserError if there is none, or none is valid: a run never starts from scratch in silence.
    """
    require(folder)
    candidates = list(reversed(_steps(folder)))
    for candidate in candidates:
        if fault := _fault(candidate):
            logger.warning("skipping checkpoint %s: %s", candidate, fault)
            continue
        try:
            _dcp(dcp.load, state, candidate)
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{candidate}: does not fit this run's networks: {_in_a_line(error)}") from None
        manifest = json.loads((candidate / MANIFEST).read_text())
        return manifest["step"], manifest["extra"]
    raise UserError(f"{folder}: none of the {len(candidates)} checkpoints is intact; start a new run")


def _in_a_line(error: BaseException) -> str:
    """Return the cause of an error in one line: the system's error, if DCP met one on any rank."""
    met: list[BaseException] = [error]
    if isinstance(error, CheckpointException):  # whose own text holds every traceback
        met = [each for each, _ in error.failures.values()]
    for each in met:
        if each.__context__ is not None:
            met.append(each.__context__)
    refusal = next((each for each in met if isinstance(each, OSError)), met[0])
    return " ".join(str(refusal).split())[-300:]


def _dcp(call: Callable[..., Any], state: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        # DCP warns about a single process, although no_dist says so.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        call(state, checkpoint_id=folder, no_dist=world_size() == 1)


def _commit(partial: Path, final: Path, step: int, extra: dict[str, Any]) -> None:
    files = {path.name: _crc32(path) for path in sorted(partial.iterdir())}
    manifest = {"step": step, "files": files, "extra": extra, "torch": torch.__version__, "processes": world_size()}
    with open(partial / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    if final.exists():  # replace the same step, saved before a resume
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    """Return whole checkpoints, oldest first; skip `.partial` ones and copies under other names."""
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    return [found[step] for step in sorted(found)]


def _fault(checkpoint: Path) -> str:
    """Return the fault of a checkpoint's files, or ""; equal on all ranks, each of which reads its share."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        own = list(files.items())[_rank() :: world_size()]
        found = next(filter(None, (_file_fault(checkpoint / name, crc) for name, crc in own)), "")
    except (OSError, ValueError, KeyError) as error:
        found = f"{MANIFEST}: {error}"
    if not dist.is_initialized():
        return found
    faults = [""] * world_size()
    dist.all_gather_object(faults, found)
    return next(filter(None, faults), "")


def _file_fault(path: Path, crc: int) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        return "" if _crc32(path) == crc else f"{path.name} is damaged (its CRC-32 differs from the manifest's)"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _any_rank(flag: bool) -> bool:
    if not dist.is_initialized():
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total)
    return bool(total)
