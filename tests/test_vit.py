"""Encoder and predictor against the functional reference in fp64, and against the layout of released checkpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_fast import reference
from cjepa_fast.config import ENCODERS, VitShape
from cjepa_fast.errors import UserError
from cjepa_fast.networks import Encoder, Impl, Predictor, build_encoder, build_predictor
from cjepa_fast.networks.precision import hold_copies
from cjepa_fast.networks.vit import IMAGENET_MEAN, IMAGENET_STD, sincos_positions

SHAPE = VitShape(48, 3, 4)
NARROW = VitShape(24, 2, 4)


def wave(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def scrambled(module: nn.Module) -> nn.Module:
    """Return the module in fp64 and away from initialisation, whose zero biases and unit norms would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def some_indices(batch: int, patches: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator)[:count].sort().values for _ in range(batch)])


@pytest.mark.parametrize("kept", [None, 5])
def test_encoder_equals_reference(kept: int | None) -> None:
    encoder = scrambled(Encoder(SHAPE, 20, 4, dtype=torch.float64))
    images = wave(2, 3, 20, 20)
    indices = None if kept is None else some_indices(2, 25, kept)
    ours, truth = encoder(images, indices), reference.encoder(encoder.state_dict(), images, indices, SHAPE.heads)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)

    state = {name: p.detach().clone().requires_grad_() for name, p in encoder.state_dict().items()}
    upstream = wave(*ours.shape)
    ours.backward(upstream)
    reference.encoder(state, images, indices, SHAPE.heads).backward(upstream)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shared_context", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_predictor_equals_reference(depth: int, shared_context: bool, packed: bool) -> None:
    """Although the first block projects unique tokens once and the last block leaves out context tokens."""
    shape = NARROW._replace(depth=depth)
    predictor = scrambled(Predictor(shape, SHAPE.width, (5, 5), shared_context=shared_context))
    lengths = [7, 4] if packed else [7, 7]
    context = wave(2, 7, SHAPE.width).requires_grad_()
    context_indices = some_indices(2, 25, 7)
    target_indices = some_indices(6, 25, 4, seed=1).view(2, 3, 4)
    state = {name: p.detach().clone().requires_grad_() for name, p in predictor.state_dict().items()}
    if packed:  # behind the last context two tokens of padding
        real = torch.arange(7) < torch.tensor(lengths)[:, None]
        tokens = torch.cat([context[real], wave(2, SHAPE.width)])
        indices = torch.cat([context_indices[real], torch.tensor([-1, -1])])
        ours = predictor(tokens, indices, target_indices, torch.tensor([0, 7, 11]).int())
    else:
        ours = predictor(context, context_indices, target_indices)
    again = context.detach().clone().requires_grad_()
    alone = [
        reference.predictor(
            state, again[i : i + 1, :n], context_indices[i : i + 1, :n], target_indices[i : i + 1], shape.heads,
            shared_context,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    truth = torch.cat(alone)
    assert ours.shape == (2, 3, 4, SHAPE.width)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    upstream = wave(*ours.shape)
    ours.backward(upstream)
    truth.backward(upstream)
    torch.testing.assert_close(context.grad, again.grad, rtol=1e-9, atol=1e-12)
    for name, parameter in predictor.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kept", [None, 4])
def test_raw_pixels_equal_normalised_images(kept: int | None) -> None:
    encoder = scrambled(Encoder(SHAPE, 16, 4, dtype=torch.float64))
    raw = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).double() for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    indices = None if kept is None else some_indices(2, 16, kept)
    torch.testing.assert_close(encoder(raw, indices), encoder(normalised, indices), rtol=1e-7, atol=1e-7)


def test_indices_of_any_integer_type() -> None:
    encoder = scrambled(Encoder(SHAPE, 16, 4, dtype=torch.float64))
    images, indices = wave(2, 3, 16, 16), some_indices(2, 16, 5)
    for dtype in (torch.int16, torch.int32):
        assert torch.equal(encoder(images, indices.to(dtype)), encoder(images, indices))


def test_positions() -> None:
    """Known values: the first half encodes the column, sine before cosine, frequencies 10000^(-i / (D/4))."""
    table = sincos_positions(8, (2, 3))[0]
    assert table.shape == (6, 8)
    row, column = 1, 2
    frequencies = [1.0, 10000 ** (-1 / 2)]
    expected = [f(c * w) for c in (column, row) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected), rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match="width 6 is not a multiple of 4"):
        sincos_positions(6, (2, 2))


# Millions of parameters, positions included, of timm's headless models of the same names (I-JEPA's for the giant)
@pytest.mark.parametrize(
    ("name", "patch", "millions"),
    [
        ("vit_tiny", 16, 5.5),
        ("vit_small", 16, 21.7),
        ("vit_base", 16, 85.8),
        ("vit_large", 16, 303.3),
        ("vit_huge", 14, 630.8),
        ("vit_giant", 16, 1011.4),
    ],
)
def test_published_sizes_and_names(name: str, patch: int, millions: float) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, 224, patch)
    shape, patches = ENCODERS[name], (224 // patch) ** 2
    state = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    d, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    expected = {
        "pos_embed": (1, patches, d), "patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,),
        "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    for i in range(shape.depth):
        matrices = ("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.fc1", hidden, d), ("mlp.fc2", d, hidden)
        for part, out, into in matrices:
            expected |= {f"blocks.{i}.{part}.weight": (out, into), f"blocks.{i}.{part}.bias": (out,)}
        for part in ("norm1", "norm2"):
            expected |= {f"blocks.{i}.{part}.weight": (d,), f"blocks.{i}.{part}.bias": (d,)}
    assert state == expected
    assert sum(p.numel() for p in encoder.state_dict().values()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_predictor_names() -> None:
    predictor = build_predictor("vit_tiny", 32, 4, depth=2, width=48)
    top = {name.split(".")[0] for name in predictor.state_dict()}
    assert top == {
        "mask_token", "predictor_pos_embed", "predictor_embed", "predictor_blocks", "predictor_norm", "predictor_proj"
    }  # fmt: skip
    assert predictor.mask_token.shape == (1, 1, 48) and predictor.predictor_pos_embed.shape == (1, 64, 48)


@pytest.mark.parametrize("rescale", [False, True])
def test_initialisation(rescale: bool) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", 32, 4, depth_rescale=rescale)
    for layer, block in enumerate(encoder.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
        expected = 0.02 / math.sqrt(2 * layer) if rescale else 0.02
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert block.attn.proj.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert not block.mlp.fc1.bias.any() and torch.equal(block.norm1.weight, torch.ones(192))
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_bf16_computes_in_bf16_with_fp32_weights() -> None:
    torch.manual_seed(0)
    low = build_encoder("vit_demo", 32, 8, dtype=torch.bfloat16)
    full = build_encoder("vit_demo", 32, 8)
    full.load_state_dict(low.state_dict())
    images = wave(2, 3, 32, 32).float()
    out, exact = low(images), full(images)
    assert out.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in low.parameters())
    assert 0 < (out.float() - exact).abs().max() < 0.1
    out.float().sin().sum().backward()
    assert low.blocks[0].attn.qkv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_bass", 32, 4), "unknown encoder 'vit_bass'; known: vit_demo"),
        (("vit_tiny", 33, 4), "image size 33 is not divisible by patch size 4"),
        (("vit_tiny", 8, 16), "image size 8 is not divisible by patch size 16"),
    ],
)
def test_bad_sizes(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(*arguments)


def test_wrong_image_size_is_refused() -> None:
    encoder = build_encoder("vit_demo", 32, 8)
    with pytest.raises(UserError, match=r"images are \(32, 48\), the encoder was built for 32 px squares"):
        encoder(torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_compute_the_same(compiled: bool) -> None:
    """Copies give the bits of casting; gradients reach the fp32 parameters, rounded on request."""
    shape, images = VitShape(32, 2, 2), torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    cast, copied, rounded = (Encoder(shape, 16, 4, dtype=torch.bfloat16) for _ in range(3))
    for encoder in (copied, rounded):
        encoder.load_state_dict(cast.state_dict())
        copies = hold_copies(encoder, torch.bfloat16, rounded_grads=encoder is rounded)
        assert len(copies) == len(list(encoder.parameters())) - 2  # all but the patch embedding's
        assert encoder.state_dict().keys() == cast.state_dict().keys()
    for encoder in (cast, copied, rounded):
        if compiled:
            encoder.blocks[0].compile(dynamic=False, fullgraph=True)
        out = encoder(images)
        (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum().backward()
        assert torch.equal(out, cast(images))
    for (name, a), b, c in zip(cast.named_parameters(), copied.parameters(), rounded.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and c.grad is not None
        # a compiler may skip a rounding before widening
        assert torch.equal(a.grad, b.grad) and torch.equal(a.grad.bfloat16(), c.grad.bfloat16()), name
        assert b.grad.dtype == torch.float32
        assert c.grad.dtype == (torch.float32 if name.startswith("patch_embed") else torch.bfloat16), name


def test_rounded_gradients_are_never_wide() -> None:
    """Also in a compiled backward pass, where a parameter's gradient would have the parameter's type."""
    encoder = Encoder(VitShape(32, 1, 2), 16, 4, dtype=torch.bfloat16)
    hold_copies(encoder, torch.bfloat16, rounded_grads=True)
    encoder.blocks[0].compile(backend="aot_eager", fullgraph=True)
    widened = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = operation(*args, **kwargs or {})
            if operation is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
                widened.append(tuple(out.shape))
            return out

    out = encoder(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).float().sum()
    with Watch():
        out.backward()
    assert {tuple(p.shape) for p in encoder.blocks.parameters() if p.ndim > 1}.isdisjoint(widened)


def test_rounded_gradients_replace_or_add() -> None:
    """As in torch: gradients add into kept memory, or replace; no copy keeps one."""
    encoder = Encoder(VitShape(32, 1, 2), 16, 4, dtype=torch.bfloat16)
    copies = hold_copies(encoder, torch.bfloat16, rounded_grads=True)

    def backward() -> torch.Tensor:
        encoder(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).float().square().sum().backward()
        assert encoder.norm.weight.grad is not None and all(copy.grad is None for copy in copies.values())
        return encoder.norm.weight.grad

    once = backward()
    address, value = once.data_ptr(), once.clone()
    assert backward().data_ptr() == address and torch.equal(once, value + value)
    encoder.zero_grad()
    assert torch.equal(backward(), value)


@pytest.mark.parametrize("shared_context", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_no_size_is_a_sum_to_a_compiler(packed: bool, shared_context: bool) -> None:
    """Sizes of a block's outputs where one program serves all: Inductor cannot divide a GPU's loops by a sum."""
    torch.compiler.reset()
    predictor = Predictor(NARROW, SHAPE.width, (4, 4), shared_context=shared_context, impl=Impl("triton"))
    sizes = []

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        (outputs,) = graph.graph.output_node().args
        sizes.extend(str(size) for out in outputs for size in out.meta["example_value"].shape)
        return graph.forward

    for block in predictor.predictor_blocks:
        block.compile(dynamic=True, fullgraph=True, backend=capture)
    context, indices = wave(2, 5, SHAPE.width).float(), torch.arange(5).repeat(2, 1)
    target = torch.arange(9).view(3, 3).repeat(2, 1, 1)
    offsets = None
    if packed:
        context, indices, offsets = context.flatten(0, 1), indices.flatten(), torch.tensor([0, 4, 9]).int()
    assert predictor(context, indices, target, offsets).shape == (2, 3, 3, SHAPE.width)
    assert len(sizes) >= 4 and not any("+" in size or "-" in size for size in sizes), sizes
