"""What loads, what is refused, and that every refusal is one line that names key, value and remedy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cjepa_fast.config import (
    Config,
    World,
    differences,
    get,
    keys,
    read_world,
    replace,
    shard_size,
    to_yaml,
    validate,
    validate_world,
)
from cjepa_fast.config.cli import load
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.schedules import count_steps
from cjepa_fast.errors import UserError
from cjepa_fast.feed.images import MAX_PIXELS

DEMO = PRESETS["demo"]


def refusal(argv: list[str]) -> str:
    """The message of the UserError that `load` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        load(argv)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# flags -> message
BAD_FLAGS = [
    ("--optim.lrr 1", "unknown flag --optim.lrr; did you mean --optim.lr?"),
    ("--optim.batchsize=1", "unknown flag --optim.batchsize; did you mean --optim.batch-size?"),
    ("--lr 1", "unknown flag --lr; did you mean --optim.lr?"),
    ("--chek", "unknown flag --chek; did you mean --check?"),
    ("--optim 3", "unknown flag --optim; did you mean --optim.lr?"),
    ("--optim.no-lr", "unknown flag --optim.no-lr; did you mean --optim.lr?"),
    ("--zzzzzzzz", "unknown flag --zzzzzzzz"),
    ("3", "unexpected argument '3'; flags look like --optim.lr 0.001"),
    ("--optim.lr abc", "--optim.lr: expected a number, got 'abc'"),
    ("--optim.lr", "--optim.lr: expected a number, got nothing"),
    ("--optim.lr 1 2", "--optim.lr: expected a number, got '1 2'"),
    ("--seed 1e3", "--seed: expected a whole number, got '1e3'"),
    ("--optim.steps 1.5", "--optim.steps: expected a whole number or None, got '1.5'"),
    (
        "--mask.mode Fixed",
        "--mask.mode: expected one of fixed, faithful, packed, rasterized, block, random, got 'Fixed'",
    ),
    ("--mask.target-scale 0.9", "--mask.target-scale: expected 2 numbers, got '0.9'"),
    ("--mask.target-scale 0.9 x", "--mask.target-scale: expected 2 numbers, got '0.9 x'"),
    ("--data.hflip maybe", "--data.hflip: expected true or false, got 'maybe'"),
    ("--data.no-hflip true", "--data.no-hflip: only switches off, without a value; write --data.hflip VALUE"),
    ("--check yes no", "--check: expected true or false, got 'yes no'"),
    ("--method simclrr", "--method: expected one of cjepa, ijepa, vicreg, got 'simclrr'"),
    (
        "--runtime.reshard always",
        "--runtime.reshard is no longer a setting: runtime.memory took its place; leave it out",
    ),
    ("--optim.eps 1e-8", "--optim.eps is no longer a setting: fixed at 1e-8; leave it out"),
    ("--runtime.no-keep-memory", "--runtime.no-keep-memory is no longer a setting: always on; leave it out"),
    ("--preset", "--preset: expected text or None, got nothing"),
    (
        "--preset cifar10_tinny",
        "--preset: unknown preset 'cifar10_tinny'; did you mean 'cifar10_tiny'?",
    ),
    (
        "--preset cifar10_tiny",
        "data.root: not set, but preset 'cifar10_tiny' needs images; add --data.root PATH",
    ),
    ("--config nowhere.yaml", "nowhere.yaml: No such file or directory; give an existing YAML file"),
    ("--resume nowhere", "--resume nowhere: no config.yaml there; give the folder of a run"),
    (
        "--resume nowhere --preset demo",
        "--preset: preset 'demo' cannot be combined with --resume, which continues a run as it is",
    ),
    (
        "--model.encoder vit_bse",
        "model.encoder: 'vit_bse' is not an encoder; did you mean 'vit_base'?",
    ),
    (
        "--model.image-size 33",
        "model.image_size: 33 is not a multiple of model.patch_size 8; use 32 or 40",
    ),
    ("--model.patch-size 0", "model.patch_size: 0 is out of range; use at least 1"),
    (
        "--model.predictor-width 50",
        "model.predictor_width: 50 is not a multiple of 4 and of vit_demo's 4 heads; use 48 or 52",
    ),
    (
        "--model.predictor-width 51",
        "model.predictor_width: 51 is not a multiple of 4 and of vit_demo's 4 heads; use 48 or 52",
    ),
    (
        "--mask.num-targets 1",
        "mask.num_targets: 1 gives no pair of views for loss.vicreg_views target_blocks; use at least 2",
    ),
    (
        "--optim.batch_size 1",
        "optim.batch_size: 1 is too small for VICReg's statistics over the batch; use at least 2",
    ),
    (
        "--loss.vicreg-coefficients 1 -1 1",
        "loss.vicreg_coefficients: (1.0, -1.0, 1.0) is out of range; use three numbers of at least 0",
    ),
    (
        "--loss.vicreg-weight 0",
        "loss.vicreg_weight: 0.0 leaves nothing of C-JEPA's terms; use method ijepa, or a weight above 0",
    ),
    ("--loss.projector 64 0", "loss.projector: (64, 0) is out of range; use widths of at least 1"),
    ("--method vicreg", "data.augment: 'none' needs augmented views; use color or byol"),
    (
        "--runtime.memory auto:x",
        "runtime.memory: 'auto:x' is no plan;"
        " use auto, auto:GB (the memory of a GPU), keep, reshard, recompute or both",
    ),
    ("--optim.lr 0", "optim.lr: 0.0 is out of range; use a number above 0"),
    ("--optim.lr nan", "optim.lr: nan is not finite; use a finite number"),
    ("--optim.ema 1.1", "optim.ema: 1.1 is out of range; use 0 to 1"),
    (
        "--optim.steps None --optim.epochs 3 --optim.warmup-epochs 3",
        "optim.warmup_epochs: 3.0 fills all of optim.epochs 3.0; use a shorter warm-up",
    ),
    (
        "--runtime.accumulate 3",
        "runtime.accumulate: 3 does not divide optim.batch_size 128; use a divisor",
    ),
    ("--data.root", "--data.root: expected text or several, got nothing"),
    ("--data.index fast", "--data.index: expected one of quick, thorough, got 'fast'"),
    ("--data.max-pixels 0", "data.max_pixels: 0 is out of range; use at least 1"),
    ("--data.augment moco", "--data.augment: expected one of none, color, byol, got 'moco'"),
    (
        "--data.augment-strength 5.1",
        "data.augment_strength: 5.1 is out of range; use 0 to 5, where hue turns by up to half the circle",
    ),
    ("--data.augment-strength nan", "data.augment_strength: nan is not finite; use a finite number"),
    (
        "--data.augment byol --model.image-size 6 --model.patch-size 3 --mask.min-keep 1 --mask.target-scale 0.3 0.5",
        "data.augment: 'byol' blurs over 6 pixels, farther than the 6 pixels of a crop; use color",
    ),
    ("--run.log-every 0", "run.log_every: 0 is out of range; use at least 1"),
    ("--run.keep-checkpoints 1", "run.keep_checkpoints: 1 is out of range; use at least 2"),
    ("--runtime.data-threads 1025", "runtime.data_threads: 1025 is out of range; use 1 to 1024"),
    ("--runtime.cpu-threads 0", "runtime.cpu_threads: 0 is out of range; use 1 to 1024"),
    (
        "--model.image-size 8",
        "model.image_size: 8 makes 1 patches of model.patch_size 8 a side; use 2 to 64 of them",
    ),
    ("--seed -1", "seed: -1 is out of range; use 0 to 2**63 - 1"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_flags(flags: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert refusal(flags.split()) == message
    assert capfd.readouterr() == ("", "")


# text of exp.yaml -> message after "exp.yaml"
BAD_YAML = [
    ("optim:\n  lrr: 1", ":2: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("optim.lr: 1", ":1: 'optim.lr' is written as a section; put 'lr: ...' under 'optim:'"),
    ("lr: 1", ":1: unknown key 'lr'; did you mean 'optim.lr'?"),
    ("optm: {lr: 1}", ":1: unknown key 'optm'; did you mean 'optim'?"),
    ("<<: {lr: 1}", ":1: unknown key '<<'"),
    ("[a]: 1", ":1: unknown key '[...]'"),
    ('"a\\nb": 1', ":1: unknown key 'a\\nb'"),
    ("optim:\n  lr: 1\n  ema: 1\n  lr: 1", ":4: 'optim.lr' is set again, first on line 2; keep one"),
    ("optim: 3", ":1: 'optim' is a section; put keys such as 'optim.batch_size' into it"),
    ("optim:", ":1: 'optim' is a section; put keys such as 'optim.batch_size' into it"),
    ("- 1", ":1: a configuration is a mapping; put keys such as 'model.encoder' into it"),
    ("optim: {lr: abc}", ":1: optim.lr: expected a number, got 'abc'"),
    ("optim: {lr: null}", ":1: optim.lr: expected a number, got null"),
    ("optim: {lr: [1, 2]}", ":1: optim.lr: expected a number, got ['1', '2']"),
    ("optim: {lr: {a: 1}}", ":1: optim.lr: expected a number, got something nested"),
    ("optim: &x {lr: *x}", ":1: optim.lr: expected a number, got something nested"),
    ("optim: {steps: 12:30}", ":1: optim.steps: expected a whole number or None, got '12:30'"),
    ("data: {crop_scale: [0.9]}", ":1: data.crop_scale: expected 2 numbers, got ['0.9']"),
    ("data: {crop_scale: 0.9}", ":1: data.crop_scale: expected 2 numbers, got '0.9'"),
    ("runtime: {prefetch: 3}", ": runtime.prefetch is no longer a setting: fixed at 2; leave it out"),
    ("data: {crop_ratios: [1, 2]}", ":1: unknown key 'data.crop_ratios'; did you mean 'data.crop_scale'?"),
    ("optim.eps: 1e-8", ": optim.eps is no longer a setting: fixed at 1e-8; leave it out"),
    ("data: {hflip: 1}", ":1: data.hflip: expected true or false, got '1'"),
    (
        "mask: {mode: null}",
        ":1: mask.mode: expected one of fixed, faithful, packed, rasterized, block, random, got null",
    ),
    ("model: {precision: fp16}", ":1: model.precision: expected one of fp32, bf16, got 'fp16'"),
    ("data: {root: [a, ~]}", ":1: data.root: expected text or several, got ['a', None]"),
    ("data: {root: {a: 1}}", ":1: data.root: expected text or several, got something nested"),
    ("preset: [demo]", ":1: preset: expected text, got ['demo']"),
    ("preset: demoo", ": unknown preset 'demoo'; did you mean 'demo'?"),
    ("optim: {lr: 1", ":1: malformed YAML, expected ',' or '}', but got '<stream end>'"),
    ("seed: 1\noptim:\n\tlr: 1", ":3: malformed YAML, found character '\\t' that cannot start any token"),
    ("a: b: c", ":1: malformed YAML, mapping values are not allowed here"),
    ("seed: 1\n---\nseed: 2", ":2: malformed YAML, but found another document"),
    ("seed: \0", ": malformed YAML, unacceptable character #x0000"),
    ("seed: \xff", ": not UTF-8 text; give a YAML file"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML, ids=[repr(text) for text, _ in BAD_YAML])
def test_bad_yaml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert refusal(["--config", str(path)]).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "text",
    [
        "model: {encoder: !!python/object/apply:os.mkdir [canary]}",
        "model: !!python/object/apply:os.mkdir [canary]",
        "!!python/object/apply:os.mkdir [canary]",
        "data: {crop_scale: [!!python/name:os.mkdir , 1]}",
    ],
)
def test_yaml_runs_no_code(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exp.yaml").write_text(text)
    message = refusal(["--config", "exp.yaml"])
    assert message.startswith("exp.yaml:1: ") and "is not allowed; write a plain value" in message
    assert not Path("canary").exists()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=30)
    | st.builds(
        "{}: {}".format,
        st.sampled_from([*{key.partition(".")[0] for key in keys()}, "preset"]),
        st.text(st.characters(codec="utf-8"), max_size=20),
    )
)
def test_any_yaml_loads_or_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load(["--config", str(path)])
    except UserError as error:
        assert str(error).splitlines() == [str(error)]


def test_precedence(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("preset: cifar10_tiny\noptim: {lr: 1e-4, final_lr: 1e-4, ema: 0.5}\ndata: {root: images}")
    second.write_text("optim: {final_lr: 1e-5, ema: 0.6}")
    argv = ["--config", str(first), "--config", str(second), "--optim.ema", "0.7"]
    expected = replace(
        PRESETS["cifar10_tiny"],
        {"optim.lr": 1e-4, "optim.final_lr": 1e-5, "optim.ema": 0.7, "data.root": ("images",)},
    )
    assert load(argv).config == expected
    assert load([*argv[-2:], *argv[:-2]]).config == expected  # a flag wins wherever it stands
    reverse = load(["--config", str(second), "--config", str(first)]).config
    assert (reverse.optim.final_lr, reverse.optim.ema) == (1e-4, 0.5)
    assert load([]).config == DEMO


def test_presets_of_two_sources_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text("preset: cifar10_tiny\ndata: {root: images}")
    load(["--config", str(path), "--preset", "cifar10_tiny"])
    assert refusal(["--config", str(path), "--preset", "demo"]) == (
        f"--preset: preset 'demo' conflicts with 'cifar10_tiny' of {path}; name one"
    )


def test_yaml_values_are_typed_by_key_not_by_yaml(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(
        "optim: {lr: 1e-4, steps: 7, epochs: 3}\n"
        "runtime: {compile: off}\nrun: {wandb: no, tensorboard: yes, dir: 2026-11-22}\n"
        "data: {root: ~, crop_scale: [1e-2, 1e-1]}\n"
    )
    config = load(["--config", str(path)]).config
    assert config.optim.lr == 1e-4 and config.data.crop_scale == (0.01, 0.1)
    assert config.optim.steps == 7 and type(config.optim.epochs) is float
    assert config.runtime.compile == "off" and config.run.wandb == "no"
    assert config.run.tensorboard is True and config.run.dir == Path("2026-11-22")
    assert config.data.root == ()


def test_flag_spellings() -> None:
    argv = "--optim.batch_size 32 --optim.lr=1e-4 --data.hflip --run.wandb x --mask.target-scale 0.1 0.2 --check"
    command = load(argv.split())
    assert command.check and command.resume is None
    assert differences(DEMO, command.config) == [
        f"mask.target_scale: {DEMO.mask.target_scale} -> (0.1, 0.2)",
        f"optim.batch_size: {DEMO.optim.batch_size} -> 32",
        f"optim.lr: {DEMO.optim.lr} -> 0.0001",
        "data.hflip: False -> True",
    ]
    for spelling in (["--data.no_hflip"], ["--data.hflip", "false"], ["--data.hflip=off"]):
        assert load(["--data.hflip", *spelling]).config == DEMO


@pytest.mark.parametrize(
    ("flags", "yaml", "root"),
    [
        ("", "[a, b=2]", ("a", "b=2")),
        ("", "a b", ("a b",)),
        ("", "[]", ()),
        ("--data.root c d=0.5 --seed 1", "[a, b]", ("c", "d=0.5")),
        ("--data.root c --data.hflip --data.root=d=0.5 e", "a", ("d=0.5", "e")),
    ],
)
def test_several_roots(flags: str, yaml: str, root: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(f"data: {{root: {yaml}}}")
    assert load(["--config", str(path), *flags.split()]).config.data.root == root


def test_the_pixel_limit_is_that_of_the_index() -> None:
    assert DEMO.data.max_pixels == MAX_PIXELS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_validate_and_survive_yaml(name: str, tmp_path: Path) -> None:
    config = replace(
        PRESETS[name],
        {"data.root": ("a b/ü: #1", "no", "x=0.5"), "run.wandb": "null", "optim.lr": 1 / 3, "optim.steps": 1},
    )
    validate(PRESETS[name])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(["--config", str(path)]).config == config
    assert hash(config) == hash(replace(config, {}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0  # type: ignore[misc]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lr=st.floats(0, exclude_min=True, allow_infinity=False), project=st.text(st.characters(codec="utf-8")))
@example(lr=0.1, project="\x85")  # a line break to YAML
def test_yaml_is_exact(lr: float, project: str, tmp_path: Path) -> None:
    if project == "None":
        return  # the spelling of no project
    config = replace(DEMO, {"optim.lr": lr, "run.wandb": project})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load(["--config", str(path)]).config == config


def a_run(tmp_path: Path, config: Config = DEMO) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def test_resume_takes_the_run_as_it_is(tmp_path: Path) -> None:
    old = replace(PRESETS["cifar10_tiny"], {"data.root": ("old",), "run.dir": Path("elsewhere")})
    run = a_run(tmp_path, old)
    command = load(["--resume", str(run), "--run.log-every", "7", "--data.root", "new", "--data.on-error", "skip"])
    assert command.resume == run
    changes = {"run.dir": run, "run.log_every": 7, "data.root": ("new",), "data.on_error": "skip"}
    assert command.config == replace(old, changes)


def test_resume_refuses_other_results(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    exp = tmp_path / "exp.yaml"
    exp.write_text("model: {encoder: vit_pico, predictor_width: 64}")
    assert refusal(["--resume", str(run), "--config", str(exp), "--optim.lr", "0.25"]) == (
        f"--resume {run}: results would change, so leave out or start a new run:"
        f" model.encoder: vit_demo -> vit_pico; model.predictor_width: {DEMO.model.predictor_width} -> 64;"
        f" optim.lr: {DEMO.optim.lr} -> 0.25"
    )
    assert "conflicts with --resume" in refusal(["--resume", str(run), "--run.dir", "other"])


@pytest.mark.parametrize("keep", [0.0, 0.35, 0.97])
def test_resume_refuses_a_torn_configuration(keep: float, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    path = run / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: int(len(lines) * keep)]))
    assert refusal(["--resume", str(run)]).startswith(f"{path}: lacks '")


def test_differences_are_those_of_results() -> None:
    assert differences(DEMO, DEMO) == []
    other = replace(DEMO, {"runtime.compile": "off", "run.log_every": 99, "run.wandb": "x"})
    assert differences(DEMO, other) == []
    here, there = replace(DEMO, {"data.root": ("a",)}), replace(DEMO, {"data.root": ("b", "c=2")})
    assert differences(here, there) == []
    assert differences(DEMO, there) == ["data.root: () -> ('b', 'c=2')"]
    assert differences(DEMO, replace(DEMO, {"seed": 5, "optim.lr": 2.0})) == [
        f"optim.lr: {DEMO.optim.lr} -> 2.0",
        "seed: 0 -> 5",
    ]


def test_replace_changes_every_key_alone() -> None:
    for key in keys():
        changed = replace(DEMO, {key: "marker"})
        assert [k for k in keys() if get(changed, k) != get(DEMO, k)] == [key]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            {"optim.batch_size": 100},
            8,
            "optim.batch_size: 100 images cannot be shared evenly by 8 processes; use 96 or 104",
        ),
        (
            {"optim.batch_size": 4},
            8,
            "optim.batch_size: 4 images cannot be shared evenly by 8 processes; use 8",
        ),
        (
            {"optim.batch_size": 100, "runtime.accumulate": 4},
            8,
            "optim.batch_size: 100 images cannot be shared evenly by 8 processes; use 96 or 128",
        ),
        (
            {"optim.batch_size": 24, "runtime.accumulate": 4},
            4,
            "runtime.accumulate: 4 parts do not divide the 6 images of a process"
            " (optim.batch_size 24 over 4); use a divisor of 6",
        ),
        (
            {"runtime.shard_size": 3},
            8,
            "runtime.shard_size: 3 does not divide the 8 processes; use one of 1, 2, 4, 8, or None",
        ),
    ],
)
def test_world_must_divide_the_batch(changes: dict[str, int], size: int, message: str) -> None:
    config = replace(DEMO, changes)
    validate(config)
    validate_world(replace(config, {"runtime.shard_size": None}), 1)
    with pytest.raises(UserError) as caught:
        validate_world(config, size)
    assert str(caught.value) == message


def test_read_world() -> None:
    launched = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    assert read_world({}) == World(rank=0, size=1, local_rank=0)
    assert read_world({"MASTER_ADDR": "localhost"}) == World()
    assert read_world(launched) == World(rank=5, size=8, local_rank=1, local_size=8)
    assert read_world(launched | {"LOCAL_WORLD_SIZE": "4"}) == World(rank=5, size=8, local_rank=1, local_size=4)
    for name in launched:
        with pytest.raises(UserError, match=rf"^{name} is not set although [A-Z_]+ is; start with torchrun"):
            read_world({key: value for key, value in launched.items() if key != name})
    with pytest.raises(UserError, match=r"^RANK 8, WORLD_SIZE 8, LOCAL_RANK 1 and LOCAL_WORLD_SIZE 8 contradict"):
        read_world(launched | {"RANK": "8"})
    with pytest.raises(UserError, match=r"LOCAL_RANK 1 and LOCAL_WORLD_SIZE 1 contradict each other"):
        read_world(launched | {"LOCAL_WORLD_SIZE": "1"})
    with pytest.raises(UserError, match=r"^WORLD_SIZE: expected a whole number, got 'two'"):
        read_world(launched | {"WORLD_SIZE": "two"})


def test_copies_of_the_state_stay_within_a_node() -> None:
    world = World(size=32, local_size=8)
    assert shard_size(DEMO, world) == 8
    assert shard_size(DEMO, World(size=8, local_size=8)) == 8
    assert shard_size(DEMO, World(size=12, local_size=8)) == 12  # a node of 8 and one of 4
    assert shard_size(replace(DEMO, {"runtime.shard_size": 16}), world) == 16


def test_count_steps() -> None:
    sizes = {"optim.steps": None, "optim.batch_size": 10, "optim.epochs": 2.5, "optim.warmup_epochs": 0.5}
    config = replace(DEMO, sizes)
    steps = count_steps(config.optim, 109)
    assert (steps.total, steps.per_epoch, steps.warmup) == (25, 10, 5)
    assert count_steps(replace(config, {"optim.steps": 7}).optim, 109).total == 7
    with pytest.raises(UserError, match=r"^optim\.batch_size: 10 exceeds the 9 training images; use at most"):
        count_steps(config.optim, 9)


def test_help_names_every_key_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--preset", "ijepa_vit_huge14_in1k", "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for key in (*keys(), "preset", "config", "resume", "check"):
        assert f"--{key.replace('_', '-')}" in text, key
    for name in PRESETS:
        assert name in text, name
    assert "(default: vit_huge)" in text
    # every key has its line of help: none is followed by its default at once
    for field in ("Peak learning rate, not scaled", "Target blocks per image;", "Newest checkpoints kept"):
        assert field in text


def test_every_key_is_documented() -> None:
    """A field without a docstring would show up in the help as its bare default."""
    import ast
    import inspect

    import cjepa_fast.config.schema as module

    for cls in ast.parse(inspect.getsource(module)).body:
        if isinstance(cls, ast.ClassDef) and cls.name.endswith("Config") and cls.name != "Config":
            body = cls.body[1:]
            for field, doc in zip(body[::2], body[1::2], strict=True):
                assert isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr), ast.unparse(field)
                assert "\n" not in ast.literal_eval(doc.value)


def test_import_needs_the_standard_library_alone() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "import cjepa_fast.config, cjepa_fast.config.cli\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names - set(sys.stdlib_module_names)))"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['cjepa_fast']"


def test_the_reference_is_made_from_the_schema() -> None:
    root = Path(__file__).parent.parent
    made = subprocess.run(
        [sys.executable, "docs/settings.py"], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    path = root / "docs" / "configuration.md"
    assert path.read_text() == made, "run python docs/settings.py > docs/configuration.md"


def test_at_most_66_settings() -> None:
    """A setting costs as much as a feature."""
    assert len(keys()) <= 66
