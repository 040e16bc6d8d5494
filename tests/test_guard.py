"""The watch over a run's figures."""

from __future__ import annotations

import math

import pytest

from cjepa_fast.run.guard import COLLAPSED, Guard


def figures(std: float, loss: float = 1.0) -> dict[str, float]:
    return {"feature_std": std, "loss": loss}


def test_a_collapse_is_told_against_the_first_line() -> None:
    guard = Guard(regularised=True)
    assert guard.warning(10, figures(2.0)) is None and guard.initial_std == 2.0
    assert guard.warning(20, figures(2.0 * COLLAPSED)) is None
    said = guard.warning(30, figures(1.9 * COLLAPSED))
    assert said is not None and said.startswith("warning: step 30: feature_std fell from 2.000 to 0.190: ")
    assert "loss.vicreg_coefficients" in said
    assert guard.warning(40, figures(3.0)) is None and guard.initial_std == 2.0


def test_the_remedy_suits_a_method_without_a_variance_term() -> None:
    guard = Guard(regularised=False)
    guard.warning(10, figures(1.0))
    said = guard.warning(20, figures(0.0))
    assert said is not None and said.endswith("lower optim.lr or use method cjepa")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss: float) -> None:
    assert Guard(regularised=True).finite(figures(1.0)) and not Guard(regularised=True).finite(figures(1.0, loss))
