"""The counted cost of a run against hand counts, torch's counter on real tensors, and itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast.config import Config, World, encoder_shape, replace
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.cost import ROOM, Plan, count, plan_memory, report
from cjepa_fast.engine.schedules import count_steps
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.masks import Masks
from cjepa_fast.methods import build_method

SMALL, BASE = (PRESETS[f"cjepa_vit_{name}16_in1k"] for name in ("small", "base"))
TINY = replace(PRESETS["cifar10_tiny"], {"optim.batch_size": 8})
TOKENS = (52.0, 35.0)


@pytest.fixture(autouse=True)
def quick_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # slow on the meta device


def masks(images: int, context: int, targets: int, blocks: int = 4, device: str = "cpu") -> Masks:
    return Masks(
        torch.arange(context, dtype=torch.int16, device=device).repeat(images, 1),
        torch.arange(targets, dtype=torch.int16, device=device).repeat(images, blocks, 1),
    )


@pytest.mark.parametrize(
    ("c", "tokens", "printed"),
    [
        (SMALL, (50.0, 33.0), (6.7, 9.1)),
        (BASE, (50.0, 33.0), (26.1, 34.9)),
    ],
)  # fmt: skip
def test_encoders_against_a_hand_count(c: Config, tokens: tuple[float, float], printed: tuple[float, float]) -> None:
    """GFLOP per image of the published networks; ours skips the embedding of patches outside the context."""
    gflop = count(replace(c, {"optim.batch_size": 4}), World(), tokens).gflop
    side = c.model.image_size // c.model.patch_size
    dropped = (side**2 - tokens[0]) * 2 * 3 * c.model.patch_size**2 * encoder_shape(c.model.encoder).width / 1e9
    assert gflop["encoder"] + dropped == pytest.approx(printed[0], rel=0.007)
    assert gflop["target_encoder"] == pytest.approx(printed[1], rel=0.007)


@pytest.mark.parametrize("changes", [{}, {"model.predictor_context": "shared"}, {"method": "ijepa"}], ids=str)
def test_flop_are_those_of_a_real_step(changes: dict[str, Any]) -> None:
    c = replace(TINY, changes)
    method = build_method(replace(c, {"runtime.kernels": "eager"}))
    images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward_backward(method, images, [masks(8, 60, 30)])
    assert sum(count(c, World(), (60.0, 30.0)).gflop.values()) * 8e9 == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


@pytest.mark.parametrize("name", ["demo", "vicreg_cifar10_tiny", "cjepa_vit_tiny16_in1k"])
def test_parameters_are_those_of_the_networks(name: str) -> None:
    c = replace(PRESETS[name], {"optim.batch_size": 4, "loss.projector": (40, 24, 40)})
    with torch.device("meta"):
        method = build_method(c)
    found = count(c, World(), (20.0, 8.0) if method.masked else None).parameters
    assert found == {
        name: sum(p.numel() for p in network.parameters() if p.requires_grad)
        for name, network in method.named_children()
    }


@pytest.mark.parametrize(
    ("c", "batch", "changes", "kept", "recomputed"),
    [
        (SMALL, 128, {}, 4.35, 1.14),
        (SMALL, 128, {"loss.projector": (8192, 8192, 8192)}, 4.90, 1.69),
        (SMALL, 128, {"runtime.accumulate": 4}, 1.31, 0.51),
        (BASE, 128, {"model.precision": "fp32"}, 10.53, 2.28),
    ],
    ids=["S", "S Gram form", "S accumulated", "B fp32"],
)
def test_memory_against_formulas(
    c: Config, batch: int, changes: dict[str, Any], kept: float, recomputed: float
) -> None:
    """GB beyond the state at the peak of a step, by formulas for these networks that once met every allocation."""
    for recompute, formula in ((False, kept), (True, recomputed)):
        memory = count(replace(c, {"optim.batch_size": batch, **changes}), World(), TOKENS, recompute=recompute).memory
        assert (memory.peak - memory.state) / 1e9 == pytest.approx(formula, rel=0.06)


def test_memory_is_at_least_what_autograd_keeps() -> None:
    """Real tensors, each storage once."""
    method, stored = build_method(replace(TINY, {"runtime.kernels": "eager"})), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            stored[storage.data_ptr()] = tensor  # keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(method, torch.zeros(8, 32, 32, 3, dtype=torch.uint8), [masks(8, 12, 9)])
    kept = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    assert kept <= count(TINY, World(), (12.0, 9.0)).memory.activations < 1.6 * kept


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_on_a_gpu(recompute: bool) -> None:
    """The count against the allocator's peak of a real step."""
    from cjepa_fast.distributed import checkpoint_activations
    from cjepa_fast.engine.build import build_optimizer
    from cjepa_fast.networks.vit import blocks

    c, device = replace(BASE, {"optim.batch_size": 128}), torch.device("cuda")
    method = build_method(c).to(device)
    for block in blocks(method, trained=True) if recompute else ():
        checkpoint_activations(block)
    build_optimizer(c, method, sharded=False)
    images = torch.zeros(128, 224, 224, 3, dtype=torch.uint8, device=device)
    for _ in range(2):
        method.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(method, images, [masks(128, 52, 35, device="cuda")])
    memory = count(c, World(), TOKENS, recompute=recompute).memory
    found = torch.cuda.max_memory_allocated() - before
    assert memory.peak - memory.state - memory.copies == pytest.approx(found, rel=0.15)


def test_state_over_processes() -> None:
    c, world = replace(SMALL, {"optim.batch_size": 64}), World(size=32, local_size=8)
    two, three = (count(c, world, TOKENS, reshard=reshard) for reshard in (False, True))
    trained, averaged = sum(two.parameters.values()), two.parameters["encoder"]
    waiting = 2 * 3 * 3 * 224**2
    assert two.memory.state == (12 * trained + 4 * averaged) / 8 + waiting  # a copy a node
    assert three.memory.copies < two.memory.copies and three.memory.peak < two.memory.peak
    whole = count(replace(c, {"runtime.shard_size": 32}), world, TOKENS).memory
    assert whole.state - waiting == (two.memory.state - waiting) / 4 and whole.gradients == two.memory.gradients / 4


def test_graphs_keep_their_outputs() -> None:
    """Gradients that stay, activations beside those of warm-up steps, and the results of each graph."""
    off, on = (
        count(replace(TINY, {"runtime.cuda_graph": graph}), World(), (12.0, 9.0)).memory for graph in ("off", "on")
    )
    assert on.peak > off.peak + off.activations


def test_memory_is_saved_in_order_of_cost() -> None:
    c, world = replace(TINY, {"optim.batch_size": 8192, "model.precision": "bf16"}), World(size=8, local_size=8)
    peaks = {
        (reshard, recompute): count(c, world, TOKENS, reshard=reshard, recompute=recompute).memory.peak / 1e9
        for reshard in (False, True) for recompute in (False, True)
    }  # fmt: skip
    order = [(False, False), (True, False), (False, True), (True, True)]
    assert [peaks[key] for key in order] == sorted(peaks.values(), reverse=True)

    def choice(memory: str, memory_gb: float | None = None) -> Plan:
        return plan_memory(replace(c, {"runtime.memory": memory}), world, TOKENS, memory_gb, measure=False)

    assert choice("auto") == Plan(False, False, None, "ZeRO-2, activations kept")
    for key in (order[0], order[2]):
        plan = choice(f"auto:{peaks[key] / ROOM + 0.001}", 1.0)  # the size given goes before the device's
        assert plan[:2] == key and plan.cost is not None
    assert "would exceed" in choice("auto", peaks[order[2]] / ROOM + 0.001).reason
    for name, key in zip(("keep", "reshard", "recompute", "both"), order, strict=True):
        assert choice(name)[:2] == key
    alone = plan_memory(replace(c, {"runtime.memory": "reshard"}), World(), TOKENS, 1, measure=False)
    assert alone[:2] == (False, False) and "raise runtime.accumulate" in alone.reason


def test_report() -> None:
    world = World(size=16, local_size=8)
    plan = plan_memory(BASE, world, TOKENS, 80, measure=True)
    text = report(BASE, world, count_steps(BASE.optim, 1_281_167), plan, TOKENS)
    for part in (
        "encoder             85,646,592",
        "target_encoder         average        34.9",
        "total               98,066,688",
        "196 per image, 52.0 in the context, 4 x 35.0 targets",
        "375,000 of 2048 images (16 x 128), 625 per epoch, 600 epochs, warm-up 9,375",
        "layout   state in 8 shards, 2 copies (auto); ZeRO-2, activations kept: about ",
        ", within 90% of 80 GB",
        "GB at the peak: state",
    ):
        assert part in text, (part, text)
