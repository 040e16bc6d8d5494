"""The models of scale and growth: their arithmetic, the names of bottlenecks, and the real step's collectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import growth
from bench.flop import gflop_per_image
from bench.scale import check, command
from bench.scale.machine import Machine, collective_ms
from bench.scale.operations import Network, Operation, Step
from bench.scale.timeline import lay_out
from bench.step.trainers import configure
from bench.training import Plan, build_method, build_sampler
from cjepa_fast import ops
from cjepa_fast.config import World, replace
from cjepa_fast.kernels import variance_covariance as kernel

PLAIN = Machine(base_us=0, intra_us=0, inter_us=0, intra_gb_s=400, inter_gb_s=50)
LATE = PLAIN._replace(base_us=10, intra_us=1, inter_us=5)
MB = 10**6


@pytest.mark.parametrize(
    ("machine", "kind", "bytes", "size", "stride", "milliseconds"),
    [
        (PLAIN, "all-gather", 800 * MB, 8, 1, 1.75),  # 7/8 of the bytes at 400 GB/s
        (PLAIN, "reduce-scatter", 800 * MB, 8, 1, 1.75),
        (PLAIN, "all-reduce", 800 * MB, 8, 1, 3.5),
        (PLAIN, "all-gather", 800 * MB, 16, 1, 1.875),  # two nodes, 8 cards each: as fast as NVLink
        (PLAIN, "all-gather", 800 * MB, 4, 4, 6.0),  # two to a node, so two cards: 3/4 at 100 GB/s
        (PLAIN, "all-reduce", 100 * MB, 2, 8, 2.0),  # one a node: 2 x 1/2 at 50 GB/s
        (LATE, "all-gather", 0, 8, 1, 0.017),  # 7 hops and the base
        (LATE, "all-gather", 0, 16, 1, 0.029),  # 14 hops within nodes, one between
        (LATE, "all-reduce", 0, 8, 1, 0.024),
        (LATE, "all-reduce", 0, 1024, 1, 0.094),  # a tree: 2 x (7 hops within nodes, 7 between)
    ],
)  # fmt: skip
def test_collectives_alone(
    machine: Machine, kind: str, bytes: int, size: int, stride: int, milliseconds: float
) -> None:
    assert collective_ms(kind, bytes, size, stride, machine) == pytest.approx(milliseconds, rel=1e-9)


def work(phase: str, milliseconds: float) -> Operation:
    return Operation("work", phase, milliseconds)


def moved(kind: str, phase: str, milliseconds: float, *, far: bool = False, starts: bool = False) -> Operation:
    """A collective among the 8 ranks of a node, or of 2 nodes, that takes so long on the plain machine."""
    rounds = 2 if kind == "all-reduce" else 1
    if far:
        return Operation(kind, phase, 0, round(milliseconds * 100 * MB / rounds), 2, 8, starts)
    return Operation(kind, phase, 0, round(milliseconds * 3200 / 7 * MB / rounds), 8, 1, starts)


def test_what_hides_behind_what() -> None:
    gather, reduction = "gather", "gradient reduction"
    step = [
        moved("all-gather", gather, 2, starts=True),  # waited for: 2
        work("forward", 10),
        moved("all-gather", gather, 13),  # begins with the work before it: 3 are left
        work("forward", 1),
        moved("all-gather", gather, 2, starts=True),  # of another network: waited for
        work("forward", 1),
        moved("all-reduce", "batch statistics", 4, far=True, starts=True),  # waited for: 4
        work("backward", 5),
        moved("reduce-scatter", reduction, 6),  # behind the next work: 1 is left when its buffer is wanted
        moved("all-reduce", reduction, 8, far=True),  # after the one within the node, beside everything else
        work("backward", 5),
        moved("reduce-scatter", reduction, 3),
        moved("all-reduce", reduction, 8, far=True),
        work("backward", 5),
        moved("reduce-scatter", reduction, 1),
        work("optimizer", 1),
    ]
    found = lay_out(iter(step), PLAIN)
    # backward starts at 23, its parts end at 28, 33 and, by the wait, 39; reduced within the node at 34, 37 and 40,
    # between nodes at 42 and, one after the other, 50
    expected = {
        "gather over NVLink": 2 + 3 + 2, "forward": 12, "batch statistics over network": 4, "backward": 15,
        "gradient reduction over NVLink": 1 + 1, "gradient reduction over network": 10, "optimizer": 1,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-6)


def test_one_gpu_computes_alone() -> None:
    row = command.rows(["tiny"], [1], 64, Machine(), {})[0]
    assert row["collectives"] == 0 and row["efficiency"] == 1 and row["bottleneck"] == "compute"
    c = replace(configure("tiny", "fixed", "bf16"), {"optim.batch_size": 64})
    context, target = build_sampler(c).expected_tokens()
    networks = build_method(c)
    trained, encoder = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (networks, networks.encoder)
    )
    compute = gflop_per_image(c, context_tokens=context, target_tokens=target).total * 64 / (989 * 0.4)
    optimizer = (28 * trained + 8 * encoder) / 4.8e9
    assert row["step_ms"] == pytest.approx(compute + optimizer, rel=1e-9)
    twice = command.rows(["tiny"], [1], 64, Machine(fraction=0.2), {"runtime.accumulate": 2})[0]["phases_ms"]
    once = row["phases_ms"]
    # half the rate; the student's first pass comes twice
    assert twice["target"] == pytest.approx(2 * once["target"]) and twice["forward"] > 3.9 * once["forward"]
    assert twice["backward"] == pytest.approx(2 * once["backward"])
    recomputed = command.rows(["tiny"], [1], 64, Machine(), {}, Plan(recompute=True))[0]["phases_ms"]
    assert recomputed["backward"] / once["backward"] == pytest.approx(1.5, rel=0.01)  # but for the projector


@pytest.mark.parametrize(
    ("shard_size", "machine", "bottleneck"),
    [
        (None, {"tflop_s": 5.0}, "compute"),
        (None, {"inter_gb_s": 1.0}, "gradient reduction over network"),
        (None, {"intra_gb_s": 2.0}, "gradient reduction over NVLink"),
        (64, {"inter_gb_s": 0.5}, "gather over network"),
        (None, {"base_us": 2000.0, "tflop_s": 100.0}, "gather over NVLink"),
        (None, {"inter_us": 3000.0, "tflop_s": 1.0, "inter_gb_s": 1e6}, "batch statistics over network"),
    ],
)  # fmt: skip
def test_the_bottleneck_has_a_name(shard_size: int | None, machine: dict[str, Any], bottleneck: str) -> None:
    plan, changes = Plan(reshard=shard_size is not None), {"runtime.shard_size": shard_size}
    row = command.rows(["tiny"], [64], 128, Machine(**machine), changes, plan)[0]
    assert row["bottleneck"] == bottleneck, row["phases_ms"]
    assert row["step_ms"] == pytest.approx(sum(row["phases_ms"].values()))
    assert row["images_s"] == pytest.approx(64 * 128 / row["step_ms"] * 1e3)
    alone = command.row("tiny", 1, 128, Machine(**machine), {}, Plan())
    assert row["efficiency"] == pytest.approx(row["images_s"] / 64 / alone["images_s"])


def test_sharding_over_nodes_waits_longer_for_the_network() -> None:
    def ms_over_network(changes: dict[str, Any]) -> float:
        row = command.rows(["tiny"], [64], 128, Machine(), changes)[0]
        return sum(ms for name, ms in row["phases_ms"].items() if name.endswith("network"))

    node, everywhere = ms_over_network({}), ms_over_network({"runtime.shard_size": 64})
    assert everywhere > node
    two, three = (
        command.rows(["tiny"], [8], 128, Machine(), {}, Plan(reshard=reshard))[0] for reshard in (False, True)
    )
    # ZeRO-3 gathers encoder and predictor twice a step
    gathered = 2 * sum(unit.elements(8) for network in _student() for unit in (network.root, *network.units))
    assert three["bytes"]["gather"] - two["bytes"]["gather"] == gathered
    assert three["bytes"]["gradient reduction"] == two["bytes"]["gradient reduction"]


def _student() -> list[Network]:
    c = replace(configure("tiny", "fixed", "bf16"), {"optim.batch_size": 1024})
    step = Step(c, World(size=8, local_size=8), plan=Plan(), tokens=(80, 33), machine=PLAIN, kernels="eager")
    return [step.encoder, step.predictor]


def test_real_steps_of_two_processes_do_what_the_model_says() -> None:
    names = ["2, ZeRO-3", "2, ZeRO-2, accumulate 2", "2, bf16, statistics by rows"]
    found = check.check(2, names)
    assert found == {name: [] for name in names}
    for name in names:
        assert len(check.predict(check.LAYOUTS[name])) == 3  # kinds: the comparison is not an empty one


def test_a_difference_has_a_line() -> None:
    predicted = check.predict(check.LAYOUTS["4, hybrid of 2, ZeRO-2"])
    assert check.differences(predicted, predicted) == []
    (number, bytes), key = predicted["all-reduce", 2, 2], ("all-reduce", 2, 2)
    assert check.differences({**predicted, key: (number, bytes + 4), ("barrier", 4, 1): (1, 0)}, predicted) == [
        f"all-reduce among 2 ranks 2 apart: the step does {number} of {bytes + 4:,} bytes, the model says {number} of "
        f"{bytes:,} bytes",
        "barrier among 4 ranks: the step does 1 of 0 bytes, the model says 0 of 0 bytes",
    ]
    assert check.main([3]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize(("rows", "width"), [(16, 40), (4, 40)], ids=["covariance", "gram"])
def test_the_kernel_sums_what_the_model_says(rows: int, width: int) -> None:
    ranks, views = 4, 4
    gram = ops.variance_covariance_form(rows, width, ranks, 4) == "gram"
    summed: list[int] = []
    z = torch.randn(rows * ranks if gram else rows, views, width)
    kernel.fwd(z, 0, rows, rows * ranks, gram, True, 1.0, 1e-4, lambda tensor: summed.append(tensor.nbytes))
    c = replace(
        configure("tiny", "fixed", "bf16"),
        {"optim.batch_size": rows * ranks, "loss.projector": (width,)},
    )
    world = World(size=ranks, local_size=ranks)
    step = Step(
        c, world, plan=Plan(), tokens=(20, 9), machine=PLAIN, kernels="triton"
    )  # fmt: skip
    sums = [operation.bytes for operation in step._statistics() if operation.kind == "all-reduce"]
    assert sums == [*summed, 4]  # the last is that of the squared distances
    assert gram == (rows == 4)


def test_scale_writes_a_record_and_a_drawing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, drawing = tmp_path / "scale.json", tmp_path / "scale.svg"
    arguments = ["--models", "tiny", "--gpus", "1", "2", "16", "--images", "8", "--inter-gb-s", "25"]
    assert command.main([*arguments, "--json", str(out), "--figure", str(drawing)]) == 0
    record = json.loads(out.read_text())
    assert record["measured"] is False and record["machine"]["inter_gb_s"] == 25
    assert [row["gpus"] for row in record["rows"]] == [1, 2, 16]
    printed = capsys.readouterr().out
    assert "assumed, not measured" in printed and "Batch statistics hide behind nothing." in printed
    assert "| tiny | 16 | 8 | 8 |" in printed
    assert drawing.read_text().startswith("<?xml")
    (axis,) = command.figure(record).axes
    (line,) = axis.lines
    assert line.get_label() == "ViT-tiny" and line.get_xdata().tolist() == [1, 2, 16]
    assert line.get_ydata().tolist() == pytest.approx([100 * row["efficiency"] for row in record["rows"]])
    assert axis.get_xlabel() == "GPUs" and axis.get_xscale() == "log" and "% of one GPU alone" in axis.get_ylabel()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "16"]
    assert "not measured" in axis.get_title()
    for wrong, message in (
        (["--gpus", "6", "--shard-size", "4"], "runtime.shard_size: 4 does not divide the 6 processes"),
        (["--gpus", "8", "6", "--batch", "64"], "--batch 64 is not a multiple of 6 GPUs"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--models", "tiny", *wrong])
        assert message in capsys.readouterr().err
    shared = command.rows(["tiny"], [1, 16], 8, Machine(), {}, batch=128)
    assert [row["images_per_gpu"] for row in shared] == [128, 8]
    assert shared[1]["efficiency"] == command.rows(["tiny"], [16], 8, Machine(), {})[0]["efficiency"]


def test_exponents_and_their_verdict() -> None:
    sizes = [2, 4, 8, 16]
    assert growth.slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.slope([1, 10, 100], [5, 5, 5]) == pytest.approx(0)
    linear = [7.0 * n for n in sizes]
    for power, kept_power, verdict in (
        (1.0, 1.0, "no surprise"), (1.14, 1.14, "no surprise"), (1.16, 1.0, "surprise: time"),
        (0.5, 1.16, "surprise: memory"), (2.0, 2.0, "surprise: time and memory"),
        (float("nan"), 1.0, "surprise: time"),
    ):  # fmt: skip
        found = growth.exponents(sizes, [n**power for n in sizes], [n**kept_power for n in sizes], linear, linear)
        assert found["verdict"] == verdict


class Exponential(torch.nn.Module):
    """exp(x W): saves x, for W's gradient, and the result; and W, which is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = torch.nn.Linear(5, 7, bias=False)

    def step(self, batch: torch.Tensor) -> None:
        self.networks(batch).exp().sum().backward()


def test_saved_bytes_are_those_of_activations() -> None:
    one = growth.Grown(3, Exponential(), torch.ones(3, 5), 1.0, 1.0)
    assert growth.saved_bytes(one) == 4 * 3 * (5 + 7)
    # what six blocks and three of the predictor save beyond two and one, without what does not grow
    small, large = (growth.build("depth", depth) for depth in (2, 6))
    more = growth.saved_bytes(large) - growth.saved_bytes(small)
    assert more == pytest.approx(large.model_bytes - small.model_bytes, rel=0.03)
    assert large.gflop > 2 * small.gflop and large.size == 6


def test_growth_measures_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_TURN_S", 0.01)
    monkeypatch.setattr(growth, "MARGIN", 9.0)  # times of single steps mean nothing here
    threads = torch.get_num_threads()
    out = tmp_path / "growth.json"
    try:
        assert growth.main(["--quick", "--axes", "width", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["sizes"] == [96, 192] and row["verdict"] == "no surprise" and all(ms > 0 for ms in row["median_ms"])
    assert 1.7 < row["time_expected"] < 2 and row["memory"] == pytest.approx(1, abs=0.05)
