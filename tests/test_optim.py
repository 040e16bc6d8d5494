"""Schedules at their published end points; which parameters decay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cjepa_fast.errors import UserError
from cjepa_fast.optim import parameter_groups, schedules
from test_step import networks

RECIPE = {"lr": 1e-3, "start_lr": 1e-4, "final_lr": 1e-6, "weight_decay": 0.04, "final_weight_decay": 0.4}


def test_learning_rate() -> None:
    lr = schedules(1000, 100, **RECIPE).lr
    assert lr[[0, 50, 100]] == pytest.approx([1e-4, (1e-4 + 1e-3) / 2, 1e-3])
    assert lr[550] == pytest.approx((1e-3 + 1e-6) / 2)  # halfway down the cosine
    assert lr[-1] == pytest.approx(1e-6, rel=0.01) and (np.diff(lr[:100]) > 0).all() and (np.diff(lr[100:]) < 0).all()


def test_weight_decay_and_ema() -> None:
    cosine = schedules(1000, 0, **RECIPE)
    line = schedules(1000, 0, **RECIPE, weight_decay_schedule="linear")
    assert cosine.weight_decay[0] == line.weight_decay[0] == 0.04
    assert line.weight_decay[250] == pytest.approx(0.04 + 0.36 / 4)
    assert cosine.weight_decay[250] == pytest.approx(0.04 + 0.36 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine.ema[0] == 0.996 and cosine.ema[500] == pytest.approx(0.998) and cosine.ema[-1] < 1


def test_schedule_scale_cuts_a_longer_schedule() -> None:
    long, cut = schedules(1250, 100, **RECIPE), schedules(1000, 100, **RECIPE, schedule_scale=1.25)
    for a, b in zip(long, cut, strict=True):
        np.testing.assert_allclose(a[:1000], b)


def test_warmup_longer_than_the_run() -> None:
    with pytest.raises(UserError, match="warm-up of 10 steps does not fit a run of 10 steps"):
        schedules(10, 10, **RECIPE)


def test_decay_groups() -> None:
    net = networks()
    decayed, others = parameter_groups(net)
    names = {id(p): name for name, p in net.named_parameters()}
    first, second = ({names[id(p)] for p in group["params"]} for group in (decayed, others))
    assert "predictor.mask_token" in first and "encoder.patch_embed.proj.weight" in first
    norms = ("norm1.weight", "norm2.weight", "norm.weight", "projector.layers.1.weight")  # the last: batch norm's scale
    assert all(name.endswith(("bias", *norms)) for name in second)
    assert not any(name.endswith(("bias", *norms)) for name in first)
    assert not any(name.startswith("target_encoder.") for name in first | second)
    assert len(first) + len(second) == sum(p.requires_grad for p in net.parameters())
