"""Patch embedding: the operation and its kernels, interpreted in fp32 without a GPU; networks on the token gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import ops, reference
from cjepa_fast.config import VitShape
from cjepa_fast.errors import UserError
from cjepa_fast.networks import Encoder, Impl, Predictor
from cjepa_fast.ops import _patch_embed as door
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where hardware rounds, so only a GPU tests 16 bits.
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.float16, marks=pytest.mark.gpu),
]
IMPLS = ["eager", "triton"]
PIXELS = ["uint8", "float"]
MODES = ["all", "kept", "packed"]
# (B, H, W, p, D, K): aligned; more rows than a program takes; nothing a multiple of anything, and more rows than a
# program sums; one row
PATCH_SHAPES = [(2, 64, 64, 16, 128, 16), (3, 12, 20, 4, 192, 13), (4, 15, 21, 3, 131, 47), (1, 4, 4, 4, 24, 1)]


def patch_inputs(shape: tuple[int, ...], pixels: str = "uint8", mode: str = "kept") -> dict[str, Any]:
    """Return arguments of `patch_embed`; packed tokens come from random images, one is padding with a wild index."""
    batch, height, width, p, embedding, kept = shape
    generator = torch.Generator().manual_seed(0)
    count = (height // p) * (width // p)
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    if pixels == "float":
        images = torch.randn(batch, 3, height, width, generator=generator)
    indices, image_of = torch.randint(count, (batch, kept), generator=generator), None
    if mode == "packed":
        indices = indices.flatten()
        image_of = torch.randint(batch, indices.shape, generator=generator).int()
        if len(indices) > 1:
            image_of[len(indices) // 2], indices[len(indices) // 2] = -1, 10**6
    weight = torch.randn(embedding, 3 * p * p, generator=generator) / (255 if pixels == "uint8" else 1)
    bias, positions = torch.randn(embedding, generator=generator), torch.randn(count, embedding, generator=generator)
    arguments = dict(
        images=images, indices=None if mode == "all" else indices, weight=weight, bias=bias, positions=positions,
        image_of=image_of,
    )  # fmt: skip
    return {**{name: x if x is None else x.to(DEVICE) for name, x in arguments.items()}, "patch_size": p}


def wave(like: Tensor) -> Tensor:
    """Return a non-constant upstream gradient."""
    return torch.arange(1, like.numel() + 1, device=like.device).double().sin().view(like.shape).to(like.dtype)


def run(f: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    output = f(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, wave(output))]


def embed_and_grads(arguments: dict[str, Any], impl: str = "triton") -> list[Tensor]:
    def embed(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.patch_embed(**{**arguments, "weight": weight, "bias": bias}, impl=impl)

    return run(embed, arguments["weight"], arguments["bias"])


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def strided(x: Tensor) -> Tensor:
    """Return the same values with other strides."""
    if x.ndim == 1:
        return torch.stack([x, x], dim=1)[:, 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("shape", PATCH_SHAPES)
def test_patch_embed_is_no_worse_than_torch(shape: tuple[int, ...], pixels: str, mode: str, dtype: torch.dtype) -> None:
    given = patch_inputs(shape, pixels, mode)
    given["positions"] = given["positions"].to(dtype)
    if pixels == "float":
        given["images"] = given["images"].to(dtype)

    def fused(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.patch_embed(**{**given, "weight": weight, "bias": bias}, impl="triton")

    def plain(weight: Tensor, bias: Tensor) -> Tensor:
        # torch's product as the yardstick: the reference adds row by row, in another order
        exact = {"weight": weight, "bias": bias, "positions": given["positions"].to(weight.dtype)}
        return ops.patch_embed(**{**given, **exact}, impl="eager")

    assert_no_worse(fused, plain, [given["weight"], given["bias"]], dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_eager_patch_embed_in_fp64_is_the_reference(pixels: str, mode: str) -> None:
    given = patch_inputs(PATCH_SHAPES[2], pixels, mode)
    given = {name: x.double() if name in ("weight", "bias", "positions") else x for name, x in given.items()}
    torch.testing.assert_close(
        ops.patch_embed(**given), reference.patch_embed(**given), rtol=1e-12, atol=1e-12
    )  # fmt: skip


@pytest.mark.parametrize("pixels", PIXELS)
def test_bias_in_fp32_beside_weights_in_16_bits(pixels: str) -> None:
    """As in the encoder: the choice must not change types."""
    given = patch_inputs(PATCH_SHAPES[1], pixels)
    given["weight"] = given["weight"].bfloat16()
    for impl in IMPLS:
        out, weight_grad, bias_grad = embed_and_grads(given, impl)
        assert (out.dtype, weight_grad.dtype, bias_grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert (bias_grad != bias_grad.bfloat16()).any()  # the kernel's sum keeps its digits


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 150),
        st.integers(1, 40),
    ),
    st.sampled_from(PIXELS),
    st.sampled_from(MODES),
)  # fmt: skip
def test_patch_embed_of_any_shape(sizes: tuple[int, ...], pixels: str, mode: str) -> None:
    batch, down, across, p, embedding, kept = sizes
    given = patch_inputs((batch, down * p, across * p, p, embedding, kept), pixels, mode)
    for ours, truth in zip(embed_and_grads(given), embed_and_grads(given, "eager"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4 * truth.abs().max().item())
    torch.testing.assert_close(ops.patch_embed(**given), reference.patch_embed(**given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_identity_weights_return_the_pixels(pixels: str, impl: str) -> None:
    given = patch_inputs((2, 8, 12, 4, 48, 4), pixels)
    count, embedding = given["positions"].shape
    images = given["images"] if pixels == "uint8" else torch.randint_like(given["images"], -99, 99)
    positions = torch.arange(count, device=DEVICE, dtype=torch.float32)[:, None].expand(-1, embedding) * 1000
    given |= {"images": images, "weight": torch.eye(48, device=DEVICE), "positions": positions, "bias": positions[3]}
    if pixels == "uint8":
        grid = images.float().view(2, 2, 4, 3, 4, 3).permute(0, 1, 3, 2, 4, 5)
    else:
        grid = images.view(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5)
    patches = grid.reshape(2, count, 48) + positions + 3000
    expected = patches.gather(1, given["indices"][..., None].expand(-1, -1, 48))
    assert torch.equal(ops.patch_embed(**given, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_all_indices_in_order_equal_none(pixels: str, impl: str) -> None:
    given = patch_inputs(PATCH_SHAPES[2], pixels, "all")
    batch, count = len(given["images"]), len(given["positions"])
    listed = torch.arange(count, device=DEVICE).expand(batch, -1)
    assert_equal(embed_and_grads({**given, "indices": listed}, impl), embed_and_grads(given, impl))


def test_packed_patches_equal_batched_ones() -> None:
    """Bitwise, with padding between them: its output is zero, its gradient ignored, however large."""
    given = patch_inputs(PATCH_SHAPES[1])
    batch, kept = given["indices"].shape
    image_of = torch.arange(batch, device=DEVICE, dtype=torch.int32).repeat_interleave(kept)
    real = torch.arange(2 * batch * kept, device=DEVICE) % 2 == 0

    def spread(x: Tensor, rest: int) -> Tensor:
        return torch.full_like(x, rest).repeat_interleave(2, 0).masked_scatter(real, x)

    packed = {**given, "indices": spread(given["indices"].flatten(), 99), "image_of": spread(image_of, -1)}
    leaves = [given[name].clone().requires_grad_() for name in ("weight", "bias")]
    out = ops.patch_embed(**{**packed, "weight": leaves[0], "bias": leaves[1]}, impl="triton")
    expected, weight_grad, bias_grad = embed_and_grads(given)
    assert torch.equal(out[real], expected.flatten(0, 1)) and not out[~real].any()
    upstream = torch.full_like(out, 1e6)
    upstream[real] = wave(expected).flatten(0, 1)
    ours = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(ours[0], weight_grad, rtol=1e-5, atol=1e-2)  # sums of another order
    torch.testing.assert_close(ours[1], bias_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_index_dtypes_agree_bitwise(dtype: torch.dtype) -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    assert_equal(embed_and_grads(given | {"indices": given["indices"].to(dtype)}), embed_and_grads(given))


@pytest.mark.parametrize("mode", ["kept", "packed"])
def test_strided_inputs_agree_bitwise(mode: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1], mode=mode)
    moved = {name: strided(x) if isinstance(x, Tensor) else x for name, x in given.items()}
    assert not any(x.is_contiguous() for x in moved.values() if isinstance(x, Tensor))
    assert_equal(embed_and_grads(moved), embed_and_grads(given))


def test_strided_upstream_gradients_agree_bitwise() -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    leaves = [given[name].clone().requires_grad_() for name in ("weight", "bias")]
    out = ops.patch_embed(**given | {"weight": leaves[0], "bias": leaves[1]}, impl="triton")
    weight_grad, bias_grad = torch.autograd.grad(out, leaves, wave(out), retain_graph=True)
    again = torch.autograd.grad(out, leaves, strided(wave(out)))
    assert torch.equal(again[1], bias_grad)
    torch.testing.assert_close(again[0], weight_grad)  # torch's product may add in another order


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "kept"), [(0, 3), (2, 0)])
def test_no_patches(batch: int, kept: int, impl: str) -> None:
    given = patch_inputs((2, 8, 8, 4, 24, 3))
    cut = given | {"images": given["images"][:batch], "indices": given["indices"][:batch, :kept]}
    out, *grads = embed_and_grads(cut, impl)
    assert out.shape == (batch, kept, 24) and not any(grad.any() for grad in grads)
    tokens = given["indices"].new_empty(0)
    packed = given | {"indices": tokens, "image_of": tokens.int()}
    out, *grads = embed_and_grads(packed, impl)
    assert out.shape == (0, 24) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize(("index", "image"), [(-1, None), (15, None), (2**32 + 3, None), (-1, 0), (0, -2), (0, 3)])
def test_patch_outside_is_loud(index: int, image: int | None) -> None:
    """Triton: NaN in this token alone. Eager: an error, except for images counted from the end."""
    given = patch_inputs(PATCH_SHAPES[1], mode="kept" if image is None else "packed")
    given["indices"].view(-1)[5] = index
    if image is not None:
        given["image_of"][5] = image
    out = ops.patch_embed(**given, impl="triton").flatten(0, -2)
    assert out[5].isnan().all() and out.isnan().any(1).sum() == 1
    if DEVICE == "cpu" and image != -2:
        with pytest.raises(IndexError):
            ops.patch_embed(**given, impl="eager")


@pytest.mark.parametrize("impl", IMPLS)
def test_images_and_positions_get_no_gradient(impl: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1], "float")
    given["images"].requires_grad_()
    given["weight"].requires_grad_()
    ops.patch_embed(**given, impl=impl).sum().backward()
    assert given["weight"].grad is not None and given["images"].grad is None
    given["positions"].requires_grad_()
    with pytest.raises(ValueError, match="positions require a gradient"):
        ops.patch_embed(**given, impl=impl)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_of_weight_and_bias_may_be_frozen(trained: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    both = dict(zip(("weight", "bias"), embed_and_grads(given)[1:], strict=True))
    leaf = given[trained].requires_grad_()
    out = ops.patch_embed(**given, impl="triton")
    assert torch.equal(torch.autograd.grad(out, leaf, wave(out))[0], both[trained])


@pytest.mark.parametrize("mode", MODES)
def test_patch_embed_registration(mode: str) -> None:
    given = patch_inputs((2, 8, 12, 4, 24, 5), mode=mode)
    names = ("images", "indices", "image_of", "weight", "bias", "positions", "patch_size")
    for name in ("weight", "bias"):
        given[name].requires_grad_()
    arguments = tuple(given[name] for name in names)
    torch.library.opcheck(door._patch_embed, arguments)
    assert not door._patch_embed(*arguments)[1].requires_grad  # or backward would make zeros for the patches
    torch.library.opcheck(door._column_sum, (given["weight"].detach().T.contiguous(), None))


def around(mode: str, impl: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the operation as a function of its differentiable arguments, between others to compile."""
    given = patch_inputs(PATCH_SHAPES[1], mode=mode)

    def f(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.patch_embed(**given | {"weight": 1.5 * weight, "bias": 1.5 * bias}, impl=impl) + 1

    return f, [given["weight"], given["bias"]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_whole_graph(mode: str, impl: str) -> None:
    """No graph break, so no wait for the device; tracing makes the choice."""
    torch.compiler.reset()
    f, leaves = around(mode, impl)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *leaves), run(f, *leaves))


@pytest.mark.parametrize("mode", MODES)
def test_under_activation_checkpointing(mode: str) -> None:
    f, leaves = around(mode, "triton")

    def again(*leaves: Tensor) -> Tensor:
        out = checkpoint(f, *leaves, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    assert_equal(run(again, *leaves), run(f, *leaves))


@pytest.mark.parametrize("mode", MODES)
def test_flops_do_not_depend_on_the_implementation(mode: str) -> None:
    counts = []
    for impl in IMPLS:
        f, leaves = around(mode, impl)
        with FlopCounterMode(display=False) as counter:
            run(f, *leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_backward_twice_gives_the_same_gradient() -> None:
    for mode in MODES:
        f, leaves = around(mode, "triton")
        assert_equal(run(f, *leaves), run(f, *leaves))


def test_impl_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        ops.patch_embed(**given, impl="cuda")
    double = given | {"weight": given["weight"].double()}
    with pytest.raises(UserError, match=r"cannot run patch_embed: dtypes torch\.float64 are not"):
        ops.patch_embed(**double, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="tensors are on cpu"):
        ops.patch_embed(**{n: x.cpu() if isinstance(x, Tensor) else x for n, x in given.items()}, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 12, 20, 4, dtype=torch.uint8)}, r"images are torch\.uint8 \(3, 12, 20, 4\)"),
        ({"images": torch.zeros(3, 12, 20, 3, dtype=torch.int64)}, r"images are torch\.int64"),
        ({"images": torch.zeros(12, 20, 3, dtype=torch.uint8)}, r"images are torch\.uint8 \(12, 20, 3\)"),
        ({"images": torch.zeros(3, 12, 22, 3, dtype=torch.uint8)}, "12 x 22 pixels do not divide into patches of 4"),
        ({"patch_size": 0}, "do not divide into patches of 0"),
        ({"weight": torch.zeros(192, 47)}, r"want weight \[D, 48\].*got \(192, 47\)"),
        ({"bias": torch.zeros(191)}, r"got \(192, 48\), \(191,\)"),
        ({"positions": torch.zeros(16, 192)}, r"positions \[15, D\], got .* \(16, 192\)"),
        ({"indices": torch.zeros(2, 13, dtype=torch.int64)}, r"indices are \(2, 13\), want \[3, K\]"),
        ({"indices": torch.zeros(3, 13)}, r"indices is torch\.float32, want int16, int32 or int64"),
        ({"image_of": torch.zeros(39, dtype=torch.int32)}, r"image_of is torch\.int32 \(39,\).*indices \(3, 13\)"),
        ({"indices": None, "image_of": torch.zeros(39, dtype=torch.int32)}, "got indices None"),
        (
            {"indices": torch.zeros(9, dtype=torch.int64), "image_of": torch.zeros(9, dtype=torch.int64)},
            r"image_of is torch\.int64",
        ),
        ({"bias": torch.zeros(192, device="meta")}, "bias is on meta, expected"),
    ],
)
def test_patch_embed_refuses(change: dict[str, Any], message: str) -> None:
    moved = {n: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**patch_inputs(PATCH_SHAPES[1]) | moved)


def networks(kernels: str) -> tuple[Encoder, Predictor]:
    torch.manual_seed(0)
    encoder = Encoder(VitShape(32, 1, 2), 16, 4, impl=Impl(kernels))
    predictor = Predictor(VitShape(16, 1, 2), 32, encoder.grid, impl=Impl(kernels))
    for parameter in (*encoder.parameters(), *predictor.parameters()):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.to(DEVICE), predictor.to(DEVICE)


@pytest.mark.parametrize("pixels", PIXELS)
def test_networks_compute_the_same_with_either_implementation(pixels: str) -> None:
    """Outputs and the gradient of every parameter; one state dict fits both."""
    given = patch_inputs((2, 16, 16, 4, 32, 6), pixels)
    targets = torch.arange(24, device=DEVICE).view(2, 3, 4).remainder(16).short()
    indices, results = given["indices"].short(), []
    for kernels in IMPLS:
        encoder, predictor = networks(kernels)
        embeddings = encoder(given["images"], indices)
        predictions = predictor(embeddings, indices, targets)
        predictions.backward(wave(predictions))
        results.append([embeddings, predictions, encoder(given["images"]), *(
            parameter.grad for network in (encoder, predictor) for parameter in network.parameters()
        )])  # fmt: skip
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert networks("eager")[0].state_dict().keys() == networks("triton")[0].state_dict().keys()


def test_networks_pass_the_choice_on() -> None:
    given = patch_inputs((2, 16, 16, 4, 32, 6))
    encoder, predictor = networks("cuda")
    with pytest.raises(UserError, match="unknown impl 'cuda' for patch_embed"):
        encoder(given["images"])
    predictor.predictor_embed.kernels = "auto"
    with pytest.raises(UserError, match="unknown impl 'cuda' for predictor_rows"):
        predictor(torch.zeros(2, 6, 32, device=DEVICE), given["indices"], given["indices"][:, None])
