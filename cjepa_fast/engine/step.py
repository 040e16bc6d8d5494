"""One training step of any method: tensors in, tensors out, no configuration, nothing that waits for the device.

Compilation and sharding are applied to a method's networks from outside (`cjepa_fast.engine.build`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_fast.distributed import world_size
from cjepa_fast.engine.optim import AdamW
from cjepa_fast.masks import Masks
from cjepa_fast.methods import Forward, Loss, Method

Parts = Sequence[Masks | None]  # the masks of each micro-batch in turn, None of methods without masks


class StepOutput(NamedTuple):
    """Detached results of a step.

    loss: scalar fp32, of the process's images where local, of the whole batch where not.
    terms: unweighted scalars [len(local_terms) + len(batch_terms)], in that order.
    predictions: [B, M, Kt, D] of JEPAs, or None.
    embeddings: [B, N, D], the judged encoder's tokens, or None if the step computed only a part of them.
    """

    loss: Tensor
    terms: Tensor
    predictions: Tensor | None
    embeddings: Tensor | None


def forward_backward(method: Method, images: Tensor, parts: Parts) -> StepOutput:
    """Compute the loss of one batch and accumulate its gradients into the method's parameters.

    A batch loss needs statistics of the whole batch, so its sum over micro-batches would be another loss. With several
    micro-batches a first pass without gradient collects the summaries. The batch loss is differentiated with respect to
    these, and a second pass carries that gradient through the networks (GradCache, Gao et al., 2021): the exact
    gradient for one more forward pass.

    Args:
        images: uint8 [B, H, W, 3] of this process, or [V, B, H, W, 3] where the method has several views.
        parts: masks of each of the equal micro-batches, on the images' device.
    """
    inputs = images.chunk(len(parts), dim=-4)
    targets = method.targets(inputs, parts)
    every = list(zip(inputs, parts, targets, strict=True))
    if len(every) == 1:
        outs, local, regular = _undivided(method, *every[0])
    else:
        outs, local, regular = _divided(method, every)
    (local_loss, local_terms), (batch_loss, batch_terms) = local, regular
    loss = (local_loss + batch_loss).detach()
    terms = torch.stack([term.detach().to(loss.dtype) for term in (*local_terms, *batch_terms)])
    return StepOutput(
        loss, terms, _joined([out.predictions for out in outs]), _joined([out.embeddings for out in outs])
    )


def _undivided(
    method: Method, images: Tensor, masks: Masks | None, targets: Tensor | None
) -> tuple[list[Forward], Loss, Loss]:
    out = method(images, masks, targets)
    nothing: Loss = images.new_zeros((), dtype=torch.float32), ()
    # The batch loss's collectives run beside the local loss; autograd keeps to the streams of the forward pass.
    side = _side_stream(images.device)
    regular = nothing
    if method.batch_terms:
        assert out.summary is not None
        with torch.cuda.stream(side):
            regular = method.batch_loss(out.summary)
    local = method.local_loss(out, masks, targets) or nothing
    if side is not None:
        torch.cuda.current_stream(images.device).wait_stream(side)
    (local[0] + regular[0]).backward()
    return [out], local, regular


def _divided(
    method: Method, parts: Sequence[tuple[Tensor, Masks | None, Tensor | None]]
) -> tuple[list[Forward], Loss, Loss]:
    nothing = parts[0][0].new_zeros((), dtype=torch.float32)
    regular: Loss = nothing, ()
    grads: Sequence[Tensor | None] = [None] * len(parts)
    if method.batch_terms:
        with torch.no_grad():
            summaries = [method(*part).summary for part in parts]
        whole = torch.cat([summary for summary in summaries if summary is not None]).requires_grad_()
        regular = method.batch_loss(whole)
        regular[0].backward()
        assert whole.grad is not None
        grads = whole.grad.chunk(len(parts))
    outs, shares, terms = [], [], []
    for part, grad in zip(parts, grads, strict=True):
        out = method(*part)
        local = method.local_loss(out, *part[1:])
        share = nothing if local is None else local[0] / len(parts)
        carried = nothing if grad is None or out.summary is None else (out.summary * grad).sum()
        (share + carried).backward()
        shares.append(share.detach())
        if local is not None:
            terms.append(torch.stack([term.detach() for term in local[1]]))
        predictions = None if out.predictions is None else out.predictions.detach()
        outs.append(out._replace(summary=None, predictions=predictions))
    means = tuple(torch.stack(terms).mean(dim=0).unbind()) if terms else ()
    return outs, (torch.stack(shares).sum(), means), regular


def train_step(
    method: Method, optimizer: AdamW, images: Tensor, parts: Parts, momentum: float, *, graphed: bool = False
) -> StepOutput:
    """Take a whole step on the device: loss, gradients, optimizer, and averages with `momentum`.

    graphed: for a CUDA graph: gradients keep their memory, and hyperparameters are those that the optimizer's
        `set_hyperparameters` last copied to the device.
    """
    out = forward_backward(method, images, parts)
    optimizer.step(momentum=momentum, held=graphed)
    optimizer.zero_grad(set_to_none=not graphed)
    return out


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate detached tensors of micro-batches; None if some are missing."""
    found = [part.detach() for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return found[0] if len(found) == 1 else torch.cat(found)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a second stream of a GPU that shares its batch statistics, behind the work queued so far; else None."""
    if device.type != "cuda" or world_size() == 1:
        return None
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
