"""What the engine builds: programs that torch.compile makes of the blocks, and masks padded to suit them."""

from __future__ import annotations

import pytest
import torch

from cjepa_fast import config
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.build import MaskFeed, build_sampler, compile_blocks
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.masks import Masks
from cjepa_fast.methods import build_method


@pytest.mark.parametrize(
    ("compiled", "device", "shorter"),
    [("auto", "cpu", True), ("static", "cpu", False), ("dynamic", "cpu", True), ("auto", "meta", False)],
)
def test_padding_is_left_where_it_keeps_shapes_few(
    compiled: str, device: str, shorter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config.replace(PRESETS["demo"], {"mask.mode": "packed", "mask.context_keep": None, "runtime.compile": compiled})
    feed = MaskFeed(c, build_method(c), torch.device("cpu"))
    if device == "meta":  # stands for a GPU, to which no copy is pinned here
        monkeypatch.setattr(Masks, "to", lambda masks, _: masks)
        feed = MaskFeed(c, build_method(c), torch.device(device))
    assert feed.sampler is not None
    (masks,), drawn = feed(0, range(8)), feed.sampler.sample(0, range(8), union=True)
    assert masks is not None and (len(masks.context) < len(drawn.context)) == shorter


def test_the_compiler_takes_the_shapes_of_all_presets() -> None:
    """Each block size has a shape of its own in the context encoder, in the predictor's first, last and other blocks,
    and where the target encoder computes unions; all rows of the target encoder, and of its last block, add two.
    """
    limits = torch._dynamo.config
    with limits.patch(recompile_limit=8, accumulated_recompile_limit=256):  # put back, also where it is changed within
        method = build_method(PRESETS["demo"])
        assert compile_blocks(method, "static", torch.device("cpu"), "fixed") == "compiled for each shape"
        least = min(limits.recompile_limit, limits.accumulated_recompile_limit)
    for name, preset in PRESETS.items():
        if preset.method == "vicreg":
            continue  # one shape
        for mode in ("fixed", "packed"):
            sampler = build_sampler(config.replace(preset, {"mask.mode": mode, "mask.context_keep": None}))
            sizes = {sampler.block_sizes(step) for step in range(2000)}
            assert 5 * len(sizes) + 2 <= least, (name, mode)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("packed", "compiled for all shapes at once (auto: packed masks)"),
        ("faithful", "compiled for all shapes at once (auto: faithful masks)"),
        ("fixed", "compiled for each shape (auto: fixed masks)"),
    ],
)
def test_programs_of_a_run(mode: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto would have on a GPU, and how often dynamo compiles for dynamic shapes: not once a block size."""
    preset = {
        "model.encoder": "vit_demo", "model.predictor_width": 48,
        "model.predictor_depth": 3, "model.precision": "fp32", "mask.mode": mode, "mask.context_keep": None,
    }  # fmt: skip
    c = config.replace(PRESETS["cjepa_vit_small16_in1k"], preset)
    method = build_method(c)
    feed = MaskFeed(c, method, torch.device("cpu"))
    sampler = feed.sampler
    assert sampler is not None
    compile_module, chosen = torch.nn.Module.compile, []

    def compile_quickly(self: torch.nn.Module, *, dynamic: bool) -> None:
        chosen.append(dynamic)
        compile_module(self, dynamic=True, backend="aot_eager")  # as Inductor does, but for the machine code

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    assert compile_blocks(method, "auto", torch.device("cuda"), mode) == said
    assert len(chosen) == 9 and set(chosen) == {mode != "fixed"}
    torch._dynamo.reset()
    programs = torch._dynamo.utils.counters["stats"]
    before, images = programs["unique_graphs"], torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    steps = {sampler.block_sizes(step): step for step in reversed(range(60))}
    for step in list(steps.values())[:8]:
        forward_backward(method, images, sampler.sample_parts(step, range(2), 1, union=True))
    assert 5 <= programs["unique_graphs"] - before <= 9
