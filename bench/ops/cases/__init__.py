"""The operations that are timed: one file each, whose `cases(device, dtype, quick)` lists the most important first.

The operation's tests, which must pass before, are tests/test_<operation>.py or those in the file's `TESTS`. `DTYPE`
names the type of an operation that has only one.

Every case states the fewest bytes through memory (each input read once, each output written once) and the
floating-point operations of the method, whatever an implementation does beyond them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.timing import Inputs, tensors

UNINTERPRETED = "Triton kernels need a GPU; the interpreter is never timed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One implementation of a case.

    Attributes:
        call: takes the case's inputs; the result is compared with the truth.
        role: "ours", "rival", or "yardstick", which does less than the operation.
        obstacle: the reason why the variant cannot run here.
        timed: "graph", "queue" (for a function that CUDA graphs refuse) or "host" (for one that never runs on a GPU).
        compared: picks the tensors of the result that are compared with the truth; None for none.
        slow_start: the first call takes seconds; left out of later cases when time is short.
    """

    name: str
    call: Callable[..., Any]
    role: str = "rival"
    obstacle: str | None = None
    timed: str = "graph"
    compared: Callable[[Any], Any] | None = tensors
    slow_start: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one operation, in one direction.

    Attributes:
        inputs: makes the arguments of every variant.
        bytes, flop: of one call, see above; 0 where no such model applies.
        items, item: number and name of the things that one call handles, where a rate is of interest.
        truth: computes the result from the inputs in fp32; None for random numbers or updates in place.
        error_limit: largest relative error that may be timed; None: by dtype, see bench.ops.run.
    """

    name: str
    direction: str
    inputs: Callable[[], Inputs]
    variants: Sequence[Variant]
    bytes: float = 0
    flop: float = 0
    items: int = 0
    item: str = ""
    truth: Callable[..., Any] | None = None
    error_limit: float | None = None


def compiled(function: Callable[..., Any]) -> Variant:
    """Return `function` under torch.compile, for the shapes of one case."""
    return Variant(name="torch.compile", call=torch.compile(function, dynamic=False), slow_start=True)


def forward_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return (upstream gradients, *arguments) -> outputs and gradients of the arguments that require one."""

    def call(upstream: Sequence[Tensor], *arguments: Any) -> Any:
        outputs = tensors(function(*arguments))
        wanted = [tensor for tensor in tensors(arguments) if tensor.requires_grad]
        return outputs, torch.autograd.grad(outputs, wanted, upstream)

    return call


def both_directions(
    name: str, variants: Sequence[Variant], inputs: Callable[[], Inputs], truth: Callable[..., Any],
    forward: tuple[float, float], backward: tuple[float, float],
    yardsticks: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Iterator[Case]:  # fmt: skip
    """Yield a case without gradients, and one with them.

    Args:
        variants: functions of `inputs`.
        inputs: makes the arguments; the second case computes their gradients where required.
        truth: a function of `inputs`, too.
        forward, backward: (bytes, flop) of each; the second case is their sum.
        yardsticks: a function of `inputs` for each case.
    """

    def constants() -> Inputs:
        return _detached(inputs())

    def with_upstream() -> Inputs:
        arguments = inputs()
        with torch.no_grad():
            outputs = tensors(truth(*arguments))
        return [torch.randn_like(output) for output in outputs], *arguments

    extra = [Variant(name="yardstick", call=call, role="yardstick", compared=None) for call in yardsticks or ()]
    yield Case(
        name=name, direction="fwd", inputs=constants, variants=[*variants, *extra[:1]], truth=truth,
        bytes=forward[0], flop=forward[1],
    )  # fmt: skip
    differentiable = [dataclasses.replace(variant, call=forward_backward(variant.call)) for variant in variants]
    extra = [dataclasses.replace(variant, call=_without_upstream(variant.call)) for variant in extra[1:]]
    yield Case(
        name=name, direction="fwd+bwd", inputs=with_upstream, variants=[*differentiable, *extra],
        truth=forward_backward(truth), bytes=forward[0] + backward[0], flop=forward[1] + backward[1],
    )  # fmt: skip


def _without_upstream(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *arguments: function(*arguments)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(_detached(part) for part in value) if isinstance(value, (tuple, list)) else value
