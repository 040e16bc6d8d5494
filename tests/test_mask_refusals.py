"""Masks that cannot be made: each refusal is one line that names the argument, its value and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cjepa_fast import config
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.build import build_sampler
from cjepa_fast.errors import UserError
from cjepa_fast.masks import MultiBlockSampler
from cjepa_fast.train import main
from masking import ABLATIONS, PAPER, make

RASTERIZED, BLOCK, RANDOM = ({"mode": mode} | ABLATIONS[mode] for mode in ABLATIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 65}, "grid: 65 is out of range; use 2 to 64"),
        ({"grid": (14, 14, 3)}, "grid: (14, 14, 3) is no grid; use patches per side, or (height, width)"),
        ({"grid": 14.0}, "grid: 14.0 is no integer; use 2 to 64"),
        (
            {"mode": "faithfull"},
            "mode: 'faithfull' is not known; use one of fixed, faithful, packed, rasterized, block, random",
        ),
        ({"mode": "rasterized"}, "num_targets: 4 does not fit mode rasterized; use 3"),
        (
            RASTERIZED | {"grid": 7},
            "mode: rasterized halves both sides of the grid, which has 7x7 patches; use even sides",
        ),
        (
            RASTERIZED | {"grid": 6},
            "min_keep: 10 does not fit the 6x6 grid: a quadrant is a 3x3 block; use min_keep <= 9 or a larger grid",
        ),
        ({"mode": "block"}, "num_targets: 4 does not fit mode block; use 1"),
        (
            BLOCK | {"target_scale": (1, 1), "target_aspect": (1, 1)},
            "min_keep: 10 does not fit the 14x14 grid: target_scale leaves 0 context patches; use a smaller "
            "target_scale",
        ),
        (RANDOM | {"num_targets": 2}, "num_targets: 2 does not fit mode random; use 1"),
        (
            RANDOM | {"target_scale": (0.15, 0.2)},
            "target_scale: (0.15, 0.2) is a range, random mode takes one scale; use one number twice",
        ),
        (
            RANDOM | {"target_scale": (0.01, 0.01)},
            "min_keep: 10 does not fit the 14x14 grid: target_scale allows 2 patches; use min_keep <= 2 or a larger "
            "target_scale",
        ),
        (
            {"mode": "packed", "target_scale": (0.8, 0.8)},
            "min_keep: 10 does not fit the 14x14 grid: 4 targets of 11x14 often leave only 0 context patches; use "
            "fewer num_targets, a smaller target_scale or a larger context_scale",
        ),
        ({"mode": "packed", "context_keep": 20}, "context_keep: 20 has no meaning in mode packed; use None"),
        ({"context_keep": 0}, "context_keep: 0 is out of range; use 1 to 4096"),
        (
            {"grid": 8, "min_keep": 4, "context_keep": 40},
            "context_keep: 40 is too many: 4 targets of 3x3 often leave only 25 context patches; use less, or fewer "
            "num_targets, a smaller target_scale or a larger context_scale",
        ),
        ({"seed": -1}, f"seed: -1 is out of range; use 0 to {2**64 - 1}"),
        ({"seed": 2**64}, f"seed: {2**64} is out of range; use 0 to {2**64 - 1}"),
        (
            {"target_scale": (0.2, 0.15)},
            "target_scale: (0.2, 0.15) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1",
        ),
        ({"target_aspect": (0, 1)}, "target_aspect: (0, 1) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 64"),
        (
            {"context_scale": (0.85, 1.1)},
            "context_scale: (0.85, 1.1) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1",
        ),
        ({"context_scale": 0.85}, "context_scale: 0.85 is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1"),
        ({"num_targets": 0}, "num_targets: 0 is out of range; use 1 to 64"),
        ({"num_targets": 2.5}, "num_targets: 2.5 is no integer; use 1 to 64"),
        ({"min_keep": 0}, "min_keep: 0 is out of range; use 1 to 4096"),
        ({"impl": "rust"}, "impl: 'rust' is not known; use auto, native, numpy or cuda"),
        (
            {"grid": 6},
            "min_keep: 10 does not fit the 6x6 grid: target_scale allows a 2x2 block; use min_keep <= 4 or a larger "
            "target_scale",
        ),
        (
            {"grid": 6, "mode": "faithful", "min_keep": 4},
            "min_keep: 4 does not fit the 6x6 grid: target_scale allows a 2x2 block; use min_keep <= 3 or a larger "
            "target_scale",
        ),
        (
            {"context_scale": (0.04, 0.05), "mode": "faithful"},
            "min_keep: 10 does not fit the 14x14 grid: context_scale allows a 3x3 block; use min_keep <= 8 or a larger "
            "context_scale",
        ),
        (
            {"target_scale": (0.001, 0.002)},
            "min_keep: 10 does not fit the 14x14 grid: target_scale allows a 0x0 block; use a larger target_scale",
        ),
        (
            {"target_scale": (0.8, 0.8)},
            "min_keep: 10 does not fit the 14x14 grid: 4 targets of 11x14 often leave only 0 context patches; use "
            "fewer num_targets, a smaller target_scale or a larger context_scale",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        MultiBlockSampler(**{"grid": 14, "mode": "fixed"} | PAPER | arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", [*PAPER, "mode", "grid"])
def test_the_sampler_has_no_defaults_of_its_own(name: str) -> None:
    arguments = {"grid": 14, "mode": "fixed"} | PAPER
    del arguments[name]
    with pytest.raises(TypeError, match=f"missing 1 required .*argument: '{name}'"):
        MultiBlockSampler(**arguments)


# changes of a configuration that `validate` takes, and the refusal of its sampler
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask.num_targets": 65}, "mask.num_targets: 65 is out of range; use 1 to 64"),
        ({"mask.mode": "rasterized"}, "mask.num_targets: 4 does not fit mode rasterized; use 3"),
        ({"mask.mode": "block", "method": "ijepa"}, "mask.num_targets: 4 does not fit mode block; use 1"),
        (
            {"mask.mode": "rasterized", "mask.num_targets": 3, "model.image_size": 36},
            "mask.mode: rasterized halves both sides of the grid, which has 9x9 patches; use even sides",
        ),
        (
            {"mask.mode": "random", "mask.num_targets": 1, "loss.vicreg_views": "context_target"},
            "mask.target_scale: (0.15, 0.2) is a range, random mode takes one scale; use one number twice",
        ),
        (
            {"mask.mode": "faithful", "mask.context_keep": 9},
            "mask.context_keep: 9 has no meaning in mode faithful; use None",
        ),
        (
            {"mask.target_scale": (0.2, 0.1)},
            "mask.target_scale: (0.2, 0.1) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1",
        ),
        (
            {"mask.context_scale": (0.5, 1.5)},
            "mask.context_scale: (0.5, 1.5) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1",
        ),
        (
            {"mask.target_aspect": (0.0, 1.0)},
            "mask.target_aspect: (0.0, 1.0) is no range; use LOW HIGH with 0 < LOW <= HIGH <= 64",
        ),
        (
            {"mask.target_scale": (0.01, 0.2)},
            "mask.min_keep: 4 does not fit the 8x8 grid: target_scale allows a 0x0 block; use a larger target_scale",
        ),
        (
            {"mask.min_keep": 64},
            "mask.min_keep: 64 does not fit the 8x8 grid: target_scale allows a 4x2 block; use min_keep <= 8 or a "
            "larger target_scale",
        ),
        pytest.param(
            {"runtime.masks": "cuda"},
            "runtime.masks: cuda is not available (torch sees no CUDA GPU); use auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to sample on"),
        ),
    ],
)
def test_masks_that_cannot_be_made_are_refused_with_their_key(changes: dict[str, Any], message: str) -> None:
    base = {"mask.target_scale": (0.15, 0.2), "mask.context_keep": None}
    c = config.replace(PRESETS["cifar10_tiny"], base | changes)
    config.validate(c)
    with pytest.raises(UserError) as refused:
        build_sampler(c)
    assert str(refused.value) == message


@pytest.mark.parametrize("mode", ["block", "random"])
def test_config_refuses_one_target_where_the_loss_compares_targets(mode: str) -> None:
    changes = {"mask.mode": mode, "mask.num_targets": 1, "mask.context_keep": None}
    with pytest.raises(UserError, match=f"mask.mode: '{mode}' has one target, no pair"):
        config.validate(config.replace(PRESETS["cifar10_tiny"], changes))


@pytest.mark.parametrize("mode", ABLATIONS)
def test_config_takes_the_ablations(mode: str) -> None:
    keys = {f"mask.{key}": value for key, value in ABLATIONS[mode].items()}
    views = "target_blocks" if mode == "rasterized" else "context_target"
    changes = {"mask.mode": mode, "mask.context_keep": None, "loss.vicreg_views": views, **keys}
    c = config.replace(PRESETS["cifar10_tiny"], changes)
    config.validate(c)
    assert build_sampler(c).mode == mode


def test_check_refuses_the_masks_before_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "cifar10_tiny", "--data.root", "nowhere", "--mask.mode", "packed", "--mask.context-keep", "9"]
    assert main([*flags, "--check"]) == 2
    assert capsys.readouterr().err == "error: mask.context_keep: 9 has no meaning in mode packed; use None\n"


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": 6},
        {"grid": 6, "mode": "faithful"},
        {"target_scale": (0.55, 0.65)},
        {"context_scale": (0.2, 0.3)},
        {"mode": "packed", "target_scale": (0.55, 0.65)},
        {"mode": "rasterized", "num_targets": 3, "grid": 10},
        {"mode": "block", "num_targets": 1, "target_scale": (0.85, 0.9)},
        {"mode": "random", "num_targets": 1, "target_scale": (0.1, 0.1)},
    ],
)
def test_the_remedy_is_the_largest_min_keep_that_works(arguments: dict) -> None:
    with pytest.raises(UserError) as refused:
        make(min_keep=30, **arguments)
    remedy = int(str(refused.value).split("min_keep <= ")[1].split()[0])
    make(min_keep=remedy, **arguments).sample(0, range(1000))
    with pytest.raises(UserError):
        make(min_keep=remedy + 1, **arguments)


@pytest.mark.parametrize(
    ("step", "ids", "word"),
    [
        (-1, [0], "step: -1 is out"),
        (2**32, [0], f"step: {2**32} is out"),
        (0.5, [0], "step: 0.5 is no integer"),
        (0, [0, -7], "-7"),
        (0, [2**63], str(2**63)),
        (0, [0.5], "float64"),
        (0, torch.tensor([True]), "bool"),
        (0, [], "[0]"),
        (0, [[0]], "[1, 1]"),
        (0, torch.arange(3, device="meta"), "meta"),
    ],
)
def test_bad_steps_and_ids_are_refused_with_the_value(step: int, ids: list[int], word: str) -> None:
    with pytest.raises(UserError) as refused:
        make().sample(step, ids)
    assert word in str(refused.value)
