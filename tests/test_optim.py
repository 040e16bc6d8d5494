"""Schedules at their published end points; which parameters decay; AdamW with averages whatever implements it."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cjepa_fast.config import OptimConfig
from cjepa_fast.engine.optim import AdamW, parameter_groups
from cjepa_fast.engine.schedules import Length, Schedules, schedules
from cjepa_fast.errors import UserError
from cjepa_fast.methods.jepa import Jepa
from cjepa_fast.ops import _choice
from cjepa_fast.run import checkpoint
from test_step import networks


def recipe(steps: int, warmup: int, **changes: Any) -> Schedules:
    return schedules(OptimConfig(**changes), Length(steps, steps, warmup))


def test_learning_rate() -> None:
    lr = recipe(1000, 100).lr
    assert lr[[0, 50, 100]] == pytest.approx([1e-4, (1e-4 + 1e-3) / 2, 1e-3])
    assert lr[550] == pytest.approx((1e-3 + 1e-6) / 2)  # halfway down the cosine
    assert lr[-1] == pytest.approx(1e-6, rel=0.01) and (np.diff(lr[:100]) > 0).all() and (np.diff(lr[100:]) < 0).all()


def test_weight_decay_and_ema() -> None:
    cosine = recipe(1000, 0, weight_decay_schedule="cosine")
    line = recipe(1000, 0)
    assert cosine.weight_decay[0] == line.weight_decay[0] == 0.04
    assert line.weight_decay[250] == pytest.approx(0.04 + 0.36 / 4)
    assert cosine.weight_decay[250] == pytest.approx(0.04 + 0.36 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine.ema[0] == 0.996 and cosine.ema[500] == pytest.approx(0.998) and cosine.ema[-1] < 1


def test_warmup_longer_than_the_run() -> None:
    with pytest.raises(UserError, match="warm-up of 10 steps does not fit a run of 10 steps"):
        recipe(10, 10)


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


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["eager", "triton"]


class Pair(nn.Module):
    """A student, some of it followed by a teacher: rows that two processes share unevenly, or that only one has."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.student = nn.ParameterDict({"three": parameter(3, 5), "one": parameter(1, 7), "bias": parameter(11)})
        self.head = nn.ParameterDict({"weight": parameter(4, 2)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def averages(self) -> dict[Tensor, Tensor]:
        return dict(zip(self.student.parameters(), self.teacher.parameters(), strict=True))


def optimizer_for(pair: Pair, impl: str, **options: Any) -> AdamW:
    return AdamW(parameter_groups(pair), lr=1e-2, averages=pair.averages(), impl=impl, **options)


def train(pair: Pair, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 5, **options: Any) -> None:
    """Steps with changing gradients, learning rates, decays and momenta; gradients are fresh memory every step."""
    for step in range(first, last):
        for index, parameter in enumerate(p for p in pair.parameters() if p.requires_grad):
            phase = 1.7 * step + index
            grad = torch.sin(phase + torch.arange(parameter.numel(), device=DEVICE)).view(parameter.shape)
            parameter.grad = distribute(grad, parameter) if isinstance(parameter, DTensor) else grad
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 / (1 + step), 0.1 * step if group["decayed"] else 0.0
        optimizer.step(**({"momentum": 0.9 + 0.01 * step} | options))
        optimizer.zero_grad()


def distribute(value: Tensor, like: DTensor) -> DTensor:
    return torch.distributed.tensor.distribute_tensor(value, like.device_mesh, like.placements)


def tensors(pair: Pair, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that training changes, on one process as on many."""
    moments = (tensor for p in pair.parameters() for tensor in optimizer.state.get(p, {}).values())
    return [
        (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in (*pair.parameters(), *moments)
    ]  # fmt: skip


def test_eager_is_torchs_optimizer_and_then_its_lerp_to_the_bit() -> None:
    ours, theirs = networks(), networks()

    def averages(net: Jepa) -> dict[Tensor, Tensor]:
        return dict(zip(net.encoder.parameters(), net.target_encoder.parameters(), strict=True))

    optimizer = AdamW(parameter_groups(ours), lr=1e-3, averages=averages(ours), impl="eager")
    torchs = torch.optim.AdamW(parameter_groups(theirs), lr=1e-3, fused=True)
    targets, sources = ([p.detach() for p in n.parameters()] for n in (theirs.target_encoder, theirs.encoder))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if p.requires_grad:
                p.grad = q.grad = torch.randn(p.shape, generator=generator)
        for group in (*optimizer.param_groups, *torchs.param_groups):
            group["lr"], group["weight_decay"] = 1e-3 * (step + 1), 0.04 * step if group["decayed"] else 0.0
        optimizer.step(momentum=0.99 + 0.001 * step)
        torchs.step()
        torch._foreach_lerp_(targets, sources, 1 - (0.99 + 0.001 * step))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(ours.encoder.norm.weight, ours.target_encoder.norm.weight)


def test_the_kernel_equals_eager_and_either_continues_the_other() -> None:
    found = {}
    for first, second in ((a, b) for a in IMPLS for b in IMPLS):
        pair = Pair().to(DEVICE)
        optimizer = optimizer_for(pair, first)
        train(pair, optimizer, 0, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = optimizer_for(pair, second)
        optimizer.load_state_dict(saved)
        train(pair, optimizer, 3, 6)
        found[first, second] = tensors(pair, optimizer)
        assert saved.keys() == {"state", "param_groups"} and saved["state"][0].keys() == {
            "step",
            "exp_avg",
            "exp_avg_sq",
        }
    for other in found.values():
        torch.testing.assert_close(other, found["eager", "eager"], rtol=3e-6, atol=3e-7)
    plain = torch.optim.AdamW(parameter_groups(Pair().to(DEVICE)), lr=1e-2, fused=True).state_dict()
    assert optimizer_for(Pair().to(DEVICE), "triton").state_dict() == plain


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {}])
def test_state_of_torchs_optimizer_goes_in_and_out(kind: dict[str, bool], impl: str) -> None:
    """Also that of the optimizers which keep their step on the CPU."""
    straight, changed = Pair().to(DEVICE), Pair().to(DEVICE)
    expected = optimizer_for(straight, "eager")
    train(straight, expected, 0, 4)
    before = torch.optim.AdamW(parameter_groups(changed), lr=1e-2, **kind)
    train_torch(changed, before, 0, 2)
    saved = before.state_dict()
    for moments in saved["state"].values():  # as under a default dtype of fp64, where torch counts in it
        moments["step"] = moments["step"].double()
    middle = optimizer_for(changed, impl)
    middle.load_state_dict(saved)
    assert all(group["fused"] and not group["foreach"] for group in middle.param_groups)
    train(changed, middle, 2, 3)
    after = torch.optim.AdamW(parameter_groups(changed), lr=1e-2, fused=True)
    after.load_state_dict(middle.state_dict())
    train_torch(changed, after, 3, 4)
    for p, q in zip(straight.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-7)


def train_torch(pair: Pair, optimizer: torch.optim.AdamW, first: int, last: int) -> None:
    """`train` with torch's optimizer, whose step knows no averages."""
    for step in range(first, last):
        stepped = optimizer.step
        optimizer.step = lambda momentum, stepped=stepped: stepped()  # type: ignore[method-assign]
        train(pair, optimizer, step, step + 1)
        optimizer.step = stepped  # type: ignore[method-assign]
        for parameter, average in pair.averages().items():
            average.lerp_(parameter.detach(), 1 - (0.9 + 0.01 * step))


@pytest.mark.parametrize("impl", IMPLS)
def test_resumed_from_a_checkpoint_to_the_bit(impl: str, tmp_path: Path) -> None:
    straight, resumed = Pair().to(DEVICE), Pair().to(DEVICE)
    optimizer = optimizer_for(straight, impl)
    train(straight, optimizer, 0, 3)
    checkpoint.save(tmp_path, 3, checkpoint.training_state(straight, optimizer), keep=2, extra={})
    train(straight, optimizer, 3, 5)
    again = optimizer_for(resumed, impl)
    checkpoint.init_state(again)
    assert checkpoint.load(tmp_path, checkpoint.training_state(resumed, again)) == (3, {})
    train(resumed, again, 3, 5)
    assert all(map(torch.equal, tensors(straight, optimizer), tensors(resumed, again)))


@pytest.mark.parametrize("impl", IMPLS)
def test_dcp_state_dicts(impl: str) -> None:
    """torch's get_ and set_optimizer_state_dict, which take a step of their own to create the state."""
    straight, resumed = Pair().to(DEVICE), Pair().to(DEVICE)
    optimizer = optimizer_for(straight, impl)
    train(straight, optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(straight, optimizer))
    again = optimizer_for(resumed, "triton" if impl == "eager" else "eager")
    teacher = copy.deepcopy(resumed.teacher)
    set_optimizer_state_dict(resumed, again, saved)
    for p, q in zip(resumed.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(p, q)
    loaded = get_optimizer_state_dict(resumed, again)["state"]
    assert loaded.keys() == saved["state"].keys() and len(loaded) == 4
    for name, moments in saved["state"].items():
        assert all(torch.equal(loaded[name][key], value) for key, value in moments.items()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_without_gradient(impl: str) -> None:
    """AdamW passes over them; their averages follow them all the same."""
    pair = Pair().to(DEVICE)
    optimizer = optimizer_for(pair, impl)
    train(pair, optimizer, 0, 1)
    idle, busy = pair.student["one"], pair.student["three"]
    before, average = idle.detach().clone(), pair.teacher["one"].clone()
    busy.grad = torch.ones_like(busy)
    optimizer.step(momentum=0.25)
    assert torch.equal(idle, before) and optimizer.state[idle]["step"] == 1 and optimizer.state[busy]["step"] == 2
    torch.testing.assert_close(pair.teacher["one"].detach(), torch.lerp(average, before, 0.75))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_momentum_averages_stay(impl: str) -> None:
    pair = Pair().to(DEVICE)
    teacher = copy.deepcopy(pair.teacher)
    train(pair, optimizer_for(pair, impl), momentum=None)
    assert all(map(torch.equal, pair.teacher.parameters(), teacher.parameters()))
    assert not torch.equal(pair.student["three"], teacher["three"])


@pytest.mark.parametrize("impl", IMPLS)
def test_copies(impl: str) -> None:
    """Of a parameter, of an average and of a parameter without average: right at once, after loading, after a step."""
    pair = Pair().to(DEVICE)
    sources = [pair.student["three"], pair.teacher["three"], pair.teacher["one"], pair.head["weight"]]
    copies = {source: torch.full_like(source, 7, dtype=torch.bfloat16) for source in sources}
    optimizer = optimizer_for(pair, impl, copies=copies)

    def error() -> float:
        return max(((low - source) / source.abs()).abs().max().item() for source, low in copies.items())

    half = torch.finfo(torch.bfloat16).eps / 2
    assert error() <= half
    with torch.no_grad():
        sources[1].mul_(1.5)
    optimizer.refresh_copies()
    assert error() <= half
    before = [low.clone() for low in copies.values()]
    train(pair, optimizer)
    assert error() <= (half if impl == "eager" or DEVICE == "cuda" else 2 * half)  # the interpreter truncates
    assert not any(map(torch.equal, before, copies.values()))


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_an_optimizer_of_torch(impl: str) -> None:
    """Closures, hooks (once) and schedulers work."""
    pair = Pair().to(DEVICE)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # from now on torch wraps the parent's step as well
    optimizer, calls = optimizer_for(pair, impl), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> float:
        calls.append("closure")
        loss = sum(p.square().sum() for p in pair.student.parameters())
        loss.backward()
        return loss.item()

    assert optimizer.step(closure, momentum=0.5) > 0
    scheduler.step()
    assert calls == ["before", "closure", "after"] and optimizer.param_groups[0]["lr"] == 5e-3


def test_what_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair().to(DEVICE)
    weight = pair.head["weight"]
    with pytest.raises(ValueError, match=r"of \(4, 2\) elements must have that shape, got \(2, 4\)"):
        AdamW([weight], averages={weight: torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="neither a parameter nor an average"):
        AdamW([weight], copies={torch.zeros(2): torch.zeros(2)})
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        optimizer_for(pair, "cuda")
    with pytest.raises(UserError, match=r"parameters or averages are torch\.float64, not fp32"):
        AdamW([weight], averages={weight: weight.detach().double()}, impl="triton")
    with pytest.raises(UserError, match="not contiguous"):
        AdamW([nn.Parameter(torch.zeros(2, 3).T)], impl="triton")
    optimizer = optimizer_for(pair, "triton")
    optimizer.param_groups[1]["amsgrad"] = True
    with pytest.raises(ValueError, match="parameter group 1: amsgrad and maximize are not offered"):
        train(pair, optimizer)
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        for impl in ("auto", "eager", "triton"):
            for _ in range(2):
                train(pair, optimizer_for(pair, impl))
    auto = "triton" if DEVICE == "cuda" else "eager"
    reasons = [f"{auto} (the tensors are on {DEVICE})", "eager (asked for)", "triton (asked for)"]
    assert caplog.messages == [f"adamw_ema: {reason}" for reason in reasons]


def test_gradients_that_are_not_contiguous() -> None:
    """Against torch's foreach optimizer: its fused one takes them for contiguous on a CPU (2.13)."""
    pair, theirs = Pair().to(DEVICE), Pair().to(DEVICE)
    optimizers = optimizer_for(pair, "triton"), torch.optim.AdamW(parameter_groups(theirs), lr=1e-2, foreach=True)
    for each, optimizer in zip((pair, theirs), optimizers, strict=True):
        each.head["weight"].grad = torch.sin(torch.arange(8.0, device=DEVICE)).view(2, 4).T
        optimizer.step()
    torch.testing.assert_close(pair.head["weight"], theirs.head["weight"], rtol=3e-6, atol=3e-7)


def shard_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for impl in IMPLS:
        pair = Pair()
        for part in (pair.student, pair.head, pair.teacher):
            fully_shard(part, mesh=mesh)
        shards = {name: tuple(p.to_local().shape) for name, p in pair.student.items() if isinstance(p, DTensor)}
        assert shards == (
            {"three": (2, 5), "one": (1, 7), "bias": (6,)}
            if rank == 0
            else {"three": (1, 5), "one": (0, 7), "bias": (5,)}
        )
        low = {pair.student["three"]: pair.student["three"].detach().bfloat16()}
        optimizer = optimizer_for(pair, impl, copies=low)
        train(pair, optimizer)
        results[impl] = tensors(pair, optimizer)
        for source, copied in low.items():
            torch.testing.assert_close(copied.full_tensor().float(), source.full_tensor(), rtol=2**-7, atol=0)
        saved = copy.deepcopy(get_optimizer_state_dict(pair, optimizer))  # continues under the other implementation
        other = optimizer_for(pair, IMPLS[1 - IMPLS.index(impl)])
        set_optimizer_state_dict(pair, other, saved)
        train(pair, other, 5, 7)
        results[f"{impl} and the other"] = tensors(pair, other)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernel is interpreted on CPU tensors only")
def test_two_processes_with_uneven_and_empty_shards_equal_one(tmp_path: Path) -> None:
    mp.spawn(shard_worker, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "results.pt")
    pair = Pair()
    optimizer = optimizer_for(pair, "eager")
    for names, (first, last) in ((IMPLS, (0, 5)), ([f"{impl} and the other" for impl in IMPLS], (5, 7))):
        train(pair, optimizer, first, last)
        for name in names:
            torch.testing.assert_close(found[name], tensors(pair, optimizer), rtol=3e-6, atol=3e-7)
