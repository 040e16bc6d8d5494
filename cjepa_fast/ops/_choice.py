"""The choice of the implementation that runs an operation, logged once."""

from __future__ import annotations

import functools
import logging
import os

from cjepa_fast.errors import UserError

log = logging.getLogger("cjepa_fast")


def require(impl: str, device_type: str) -> None:
    """Raise UserError if `impl` cannot run on tensors of this device type; to ask before a run."""
    if impl == "triton" and (obstacle := triton_obstacle(device_type)):
        raise UserError(f"runtime.kernels: triton cannot run: {obstacle}; use eager or auto")


def choose(op: str, impl: str, device: str, unsupported: str | None) -> str:
    """Return "triton" or "eager", whichever runs `op`, and log the choice once.

    Args:
        device: type of the tensors' device.
        unsupported: why the kernel cannot take the arguments; None if it can.

    Raises UserError if `impl` is unknown or cannot run.
    """
    if impl not in ("auto", "triton", "eager"):
        raise UserError(f"unknown impl {impl!r} for {op}; known: auto, triton, eager")
    obstacle = unsupported or triton_obstacle(device)
    if impl == "triton" and obstacle:
        raise UserError(f"impl='triton' cannot run {op}: {obstacle}; take impl='eager' or 'auto'")
    where = f"the tensors are on {device}"
    if impl != "auto":
        choice, reason = impl, "asked for"
    elif device != "cuda" or not obstacle:
        choice, reason = "triton" if device == "cuda" else "eager", where
    else:
        choice, reason = "eager", obstacle
    announce(op, choice, reason)
    return choice


# Same as torch.compiler.assume_constant_result, without importing dynamo, which takes a second. A compiled step then
# runs the choice, its imports and its log line once, during tracing.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_obstacle(device: str) -> str | None:
    """Return why Triton kernels cannot run on tensors of this device type; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"the tensors are on {device}, not cuda" + (" (or set TRITON_INTERPRET=1)" if device == "cpu" else "")


@functools.cache
def announce(op: str, choice: str, reason: str) -> None:
    log.info("%s: %s (%s)", op, choice, reason)
