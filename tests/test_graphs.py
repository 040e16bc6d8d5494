"""Steps replayed from CUDA graphs: the same run as without, on a CPU with a stand-in for what CUDA does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cjepa_fast import config, ops
from cjepa_fast.engine import graphs, optim
from cjepa_fast.engine.optim import AdamW
from cjepa_fast.engine.step import StepOutput
from cjepa_fast.errors import UserError
from cjepa_fast.masks import Masks
from cjepa_fast.train import main
from runs import metrics, without_clocks, write_images

STEPS = 20


def tensors(out: StepOutput) -> list[torch.Tensor]:
    return [tensor for tensor in out if tensor is not None]


class StandIn:
    """Records the step as a `graphs.Recorder` does, and runs it anew for a replay.

    What a graph would not do fails or shows: results lie where they lay and the next replay makes those of all others
    NaN, whose memory it may use; hyperparameters cannot be taken to the device; gradients may not move.
    """

    made: list[StandIn]

    def __init__(self, device: torch.device) -> None:
        self.results: list[list[torch.Tensor]] = []
        self.warm_ups = self.captures = self.replays = 0
        self.made.append(self)

    def warm_up(self, step: Callable[[], StepOutput]) -> StepOutput:
        self.warm_ups += 1
        return step()

    def capture(self, step: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        self.captures += 1
        static: list[StepOutput] = []

        def replay() -> StepOutput:
            self.replays += 1
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(AdamW, "set_hyperparameters", self._refuse)
                out = step()
            if not static:
                static.append(StepOutput(*(None if tensor is None else tensor.clone() for tensor in out)))
                self.results.append(tensors(static[0]))
            for result in self.results:
                for tensor in result:
                    tensor.fill_(torch.nan)
            for tensor, value in zip(tensors(static[0]), tensors(out), strict=True):
                tensor.copy_(value)
            return static[0]

        return replay

    def _refuse(self, momentum: float | None) -> None:
        raise AssertionError("a graph would take the same hyperparameters to the device in every replay")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Graphs on a CPU, and the optimizer's kernel in plain torch, with its hyperparameters on the device."""
    gradients: dict[int, int] = {}

    def update(parameters: Any, grads: Any, *args: Any, impl: str, **kwargs: Any) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            graphs_run = StandIn.made and StandIn.made[-1].warm_ups
            if graphs_run and gradients.setdefault(parameter.data_ptr(), grad.data_ptr()) != grad.data_ptr():
                raise RuntimeError("a gradient has moved")
        kernel(parameters, grads, *args, impl="eager", **kwargs)

    kernel, choose = ops.adamw_ema, ops.choose
    monkeypatch.setattr(optim.ops, "adamw_ema", update)
    monkeypatch.setattr(optim.ops, "choose", lambda op, *rest: "triton" if op == "adamw_ema" else choose(op, *rest))
    monkeypatch.setattr("cjepa_fast.run.job.pick_device", lambda *args: torch.device("cpu"))
    monkeypatch.setattr(graphs, "require", lambda *args: None)
    monkeypatch.setattr(graphs, "Recorder", StandIn)
    monkeypatch.setattr(Masks, "trimmed", lambda masks: masks)  # a GPU's keep their padding
    # else every step of so small a batch would show the health figures all target rows
    monkeypatch.setattr("cjepa_fast.run.meter.FEATURE_ROWS", 16)
    StandIn.made = []
    return StandIn


@pytest.fixture(scope="module")
def images(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 40)


def run(images: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    arguments = (
        "--model.encoder vit_demo --model.image-size 24 --model.patch-size 4 --model.predictor-depth 1 "
        "--model.predictor-width 48 --model.precision fp32 --mask.target-scale 0.1 0.2 --mask.min-keep 2 "
        "--mask.context-keep None --mask.context-scale 1 1 --loss.vicreg-weight 0.01 --optim.batch-size 8 "
        f"--optim.steps {STEPS} --optim.warmup-epochs 0.2 --run.log-every 3 --run.checkpoint-every 8 "
        f"--optim.final-weight-decay 0.4 --runtime.data-threads 1 --data.root {images} --run.dir {out}"
    ).split()  # fmt: skip
    assert main([*arguments, *more]) == 0
    return without_clocks(metrics(out))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--mask.mode", "packed", "--model.precision", "bf16"],
        ["--loss.vicreg-views", "context_target"],
        ["--data.augment", "color"],
    ],
    ids=" ".join,
)
def test_graphs_change_nothing(images: Path, tmp_path: Path, stand_in: type[StandIn], more: list[str]) -> None:
    """Every figure of 20 steps, in which each step has its own learning rate, weight decay and momentum."""
    plain = run(images, tmp_path / "plain", *more)
    graphed = run(images, tmp_path / "graphed", *more, "--runtime.cuda-graph", "on")
    assert graphed == plain and len(plain) == 9 and plain[0]["weight_decay"] != plain[1]["weight_decay"]
    (recorder,) = stand_in.made
    assert recorder.captures >= 2 and recorder.replays >= 5
    assert recorder.warm_ups + recorder.replays == STEPS


def test_resume(images: Path, tmp_path: Path, stand_in: type[StandIn]) -> None:
    """A resumed run warms up anew, and goes on exactly."""
    straight = run(images, tmp_path / "run", "--runtime.cuda-graph", "on")
    for step in (16, STEPS):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert without_clocks(metrics(tmp_path / "run")) == straight
    assert len(stand_in.made) == 2 and stand_in.made[1].captures > 0


class Fake:
    """An optimizer, and a step whose results tell its inputs."""

    def __init__(self) -> None:
        self.momentum: float | None = None

    def set_hyperparameters(self, momentum: float) -> None:
        self.momentum = momentum

    def step(self, images: torch.Tensor, masks: Any, momentum: float, *, graphed: bool = False) -> StepOutput:
        assert graphed and self.momentum is not None
        (mask,) = masks
        loss = images.sum() + mask.context.sum() + self.momentum
        return StepOutput(loss, loss[None], images + 1, None)


def inputs(length: int, value: float) -> tuple[torch.Tensor, list[Masks]]:
    return torch.full((2, 3), float(value)), [Masks(torch.full((2, length), int(value)), torch.zeros(2, 1, 1))]


def test_each_shape_is_captured_once_and_no_more_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    StandIn.made = []
    monkeypatch.setattr(graphs, "MOST", 2)
    fake, recorder = Fake(), StandIn(torch.device("cpu"))
    step: Any = graphs.GraphedStep(fake.step, fake, recorder)  # pyright: ignore[reportArgumentType]
    for value in range(1, 7):
        for length in (1, 2, 3):
            out = step(*inputs(length, value), momentum=value / 8)
            assert out.loss == 6 * value + 2 * length * value + value / 8
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (2 * graphs.WARM_UPS, 2, 2 * 4)
    assert caplog.text.count("further ones run without graph") == 1


def test_results_last_until_the_next_step() -> None:
    StandIn.made = []
    fake, recorder = Fake(), StandIn(torch.device("cpu"))
    step: Any = graphs.GraphedStep(fake.step, fake, recorder)  # pyright: ignore[reportArgumentType]
    for _ in range(graphs.WARM_UPS + 1):
        first, second = (step(*inputs(length, 1.0), momentum=0.0) for length in (1, 2))
    assert first.loss.isnan() and second.loss == 10


ONE_SIZE = [
    *("--mask.target-scale", "0.17", "0.17", "--mask.target-aspect", "1", "1"),
    *("--model.precision", "bf16", "--runtime.compile", "static"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more",
    [["--runtime.compile", "off"], ["--runtime.compile", "off", "--mask.mode", "packed"], ONE_SIZE],
    ids=" ".join,
)
def test_graphs_change_nothing_on_a_gpu(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Real captures and replays, also of compiled blocks; ours are deterministic, torch's kernels need not all be."""
    monkeypatch.setattr("cjepa_fast.run.meter.FEATURE_ROWS", 16)
    more = ["--runtime.device", "cuda", *more]
    plain = run(images, tmp_path / "plain", *more)
    graphed = run(images, tmp_path / "graphed", *more, "--runtime.cuda-graph", "on")
    tolerance = 1e-2 if "bf16" in more else 1e-4
    for a, b in zip(plain, graphed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance), f"step {a['step']}"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask.mode", "faithful"], "'on' needs the same token counts in every batch; use mask.mode fixed or packed"),
        (["--runtime.accumulate", "2"], "'on' captures undivided batches; use runtime.accumulate 1"),
        (["--runtime.kernels", "eager"], "'on' needs the optimizer's Triton kernel; use runtime.kernels auto"),
        (["--runtime.attention", "xformers"], "'on' cannot capture xformers, which reads offsets"),
        (["--runtime.device", "cpu"], "'on' needs a GPU; use off"),
        pytest.param(
            [], "on needs a GPU, the run is on cpu; use off",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert main(["--runtime.cuda-graph", "on", "--mask.context-keep", "None", "--run.dir", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: runtime.cuda_graph: {message}") and error.count("\n") == 1
    assert not out.exists()


def test_several_processes_are_refused() -> None:
    changed = config.replace(config.Config(), {"runtime.cuda_graph": "on"})
    config.validate_world(changed, 1)
    with pytest.raises(UserError, match=r"runtime.cuda_graph: on captures the step of one process, there are 2"):
        config.validate_world(changed, 2)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.ops, "choose", lambda *args: "eager")
    with pytest.raises(UserError, match="on needs the optimizer's Triton kernel, which cannot run"):
        graphs.require("auto", torch.device("cuda"))
