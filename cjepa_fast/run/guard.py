"""The watch over a run's figures: collapse of the embeddings, and a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

COLLAPSED = 0.1  # a feature_std under this share of the first line's is called a collapse


class Guard:
    """The first line's `feature_std`, and the judgement of later lines against it.

    regularised: the loss has VICReg's variance term.
    """

    def __init__(self, regularised: bool) -> None:
        self._remedy = "raise the second of loss.vicreg_coefficients" if regularised else "use method cjepa"
        self.initial_std: float | None = None

    def finite(self, figures: Mapping[str, float]) -> bool:
        """Return whether the run can go on."""
        return math.isfinite(figures["loss"])

    def warning(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Return a line for the operator if the embeddings collapse."""
        now = figures["feature_std"]
        self.initial_std = self.initial_std or now
        if now >= COLLAPSED * self.initial_std:
            return None
        return (
            f"warning: step {step}: feature_std fell from {self.initial_std:.3f} to {now:.3f}: "
            f"the embeddings collapse; lower optim.lr or {self._remedy}"
        )
