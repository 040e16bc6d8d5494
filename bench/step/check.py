"""The comparison of all trainers with ours: losses, gradients and updates of a small model.

In fp32, with the VICReg terms weighted up until they show in the loss. Every rung of the waterfall is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.step import trainers
from bench.step.references import Trainer
from cjepa_fast import config

VARIANTS = (
    "ours",
    "ours:kernels=eager",
    "ours:accumulate=2",
    "eager",
    "eager:attention=sdpa",
    "eager:attention=sdpa,pairs=off,syncs=off",
    "eager:fused=on",
    "tuned:compile=off",
)
LOSS_LIMIT = 1e-5  # relative
GRADIENT_LIMIT = 1e-5  # of all gradients of a network together, relative, Frobenius norm
TENSOR_LIMIT = 1e-3  # of one tensor: the terms of a bias's gradient may cancel down to three digits
UPDATE_LIMIT = 1e-6  # absolute, after one step from the same gradients


def named(trainer: Trainer) -> dict[str, Tensor]:
    """Return the parameters under our names."""
    return {name.replace(".inner.", "."): p for name, p in trainer.networks.named_parameters()}


def differences(
    device: torch.device, checkout: str | None = None, mask_modes: tuple[str, ...] = ("fixed", "packed")
) -> list[str]:
    """Return a line for each difference, beginning with the trainer's name; none if all do the same work."""
    found: list[str] = []
    variants = VARIANTS if checkout is None else (*VARIANTS, f"ijepa:checkout={checkout}")
    for mode in mask_modes:
        c = config.replace(trainers.configure("tiny", mode, "fp32"), {"loss.vicreg_weight": 1.0})
        if checkout is not None:
            # an encoder that the checkout has
            c = config.replace(c, {"model.encoder": "vit_tiny", "model.predictor_width": 96})
        (drawn,) = trainers.sample(c, 6, 1)
        ours = trainers.build(trainers.Spec.parse("ours"), c, device)
        truth = float(ours.gradients(ours.batch(drawn)))
        grads = {name: p.grad.clone() for name, p in named(ours).items() if p.grad is not None}
        ours.update()
        after = {name: p.detach() for name, p in named(ours).items()}
        for variant in variants[1:]:
            try:
                rival = trainers.build(trainers.Spec.parse(variant), c, device)
            except trainers.CannotRun as error:
                if mode == "fixed":  # a rival without packed contexts is not at fault
                    found.append(f"{variant} {mode}: {error}")
                continue
            lines = compare(rival, rival.batch(drawn), truth, grads, after)
            found += [f"{variant} {mode}: {line}" for line in lines]
    return found


def compare(
    rival: Trainer, batch: tuple, truth: float, grads: dict[str, Tensor], after: dict[str, Tensor]
) -> list[str]:
    """Compare a trainer's loss, gradients, and weights after an update from our gradients with ours, a line each."""
    lines = []
    loss = float(rival.gradients(batch))
    if not abs(loss - truth) <= LOSS_LIMIT * abs(truth):
        lines.append(f"loss {loss:.8g}, ours {truth:.8g}")
    parameters = named(rival)
    squares: dict[str, list[float]] = {}
    for name, grad in grads.items():
        theirs = parameters[name].grad
        error, norm = float("inf") if theirs is None else float((theirs - grad).norm()), float(grad.norm())
        # softmax does not see a key's bias, so its gradient is rounding: it counts in its network's sum alone
        if not error <= TENSOR_LIMIT * norm and not name.endswith("qkv.bias"):
            lines.append(f"gradient of {name} differs by {error:.2g}, its norm is {norm:.2g}")
        pair = squares.setdefault(name.partition(".")[0], [0.0, 0.0])
        pair[0], pair[1] = pair[0] + error**2, pair[1] + norm**2
        parameters[name].grad = grad.clone()
    for network, (error, norm) in squares.items():
        if not error <= GRADIENT_LIMIT**2 * norm:
            lines.append(f"gradients of the {network} differ by {(error / norm) ** 0.5:.2g}, relative")
    rival.update()
    for name, weight in after.items():
        error = float((parameters[name].detach() - weight).abs().max())
        if not error <= UPDATE_LIMIT:
            lines.append(f"{name} after the update differs by {error:.2g}")
    return lines


def main(device: str, checkout: str | None) -> int:
    """Print the differences; return the exit code."""
    wrong = differences(torch.device(device), checkout)
    print("\n".join(wrong) if wrong else "all trainers: the loss, the gradients and the update of ours")
    return 1 if wrong else 0
