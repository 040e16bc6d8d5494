"""The token gather: both operations, their kernels (interpreted in fp32 without a GPU) and the networks on them."""

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
from cjepa_fast.networks.vit import Encoder, Predictor
from cjepa_fast.ops import _token_gather as door
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter truncates to bf16 where hardware rounds, so 16 bits are judged on a GPU only
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
# (B, Kc, M, Kt, D, N): aligned; partial; nothing a multiple of anything; one token each
TOKEN_SHAPES = [(2, 32, 4, 32, 128, 36), (2, 5, 3, 7, 192, 36), (3, 11, 2, 25, 131, 17), (1, 1, 1, 1, 24, 1)]


def patch_inputs(shape: tuple[int, ...], pixels: str = "uint8", mode: str = "kept") -> dict[str, Any]:
    """Arguments of `patch_embed`; packed tokens are of random images, one of them padding with a wild index."""
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


def token_inputs(shape: tuple[int, ...], *, packed: bool = False, shared: bool = False) -> dict[str, Any]:
    """Arguments of `predictor_tokens`; packed contexts have random lengths, 0 among them, and padding behind."""
    batch, kept, blocks, length, width, count = shape
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(batch, kept, width, generator=generator)
    context_indices = torch.randint(count, (batch, kept), generator=generator)
    offsets = None
    if packed:
        context, context_indices = context.flatten(0, 1), context_indices.flatten()
        lengths = torch.randint(kept + 1, (batch,), generator=generator)
        lengths[batch // 2] = kept if batch == 1 else 0
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        context_indices[int(offsets[-1]) :] = -7
    arguments = dict(
        context=context, mask_token=torch.randn(1, 1, width, generator=generator),
        positions=torch.randn(count, width, generator=generator), context_indices=context_indices,
        target_indices=torch.randint(count, (batch, blocks, length), generator=generator), offsets=offsets,
    )  # fmt: skip
    return {**{name: x if x is None else x.to(DEVICE) for name, x in arguments.items()}, "shared_context": shared}


def wave(like: Tensor) -> Tensor:
    """A non-constant upstream gradient."""
    return torch.arange(1, like.numel() + 1, device=like.device).double().sin().view(like.shape).to(like.dtype)


def run(f: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and the gradients of the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    output = f(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, wave(output))]


def embed_and_grads(arguments: dict[str, Any], impl: str = "triton") -> list[Tensor]:
    def embed(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.patch_embed(**{**arguments, "weight": weight, "bias": bias}, impl=impl)

    return run(embed, arguments["weight"], arguments["bias"])


def tokens_and_grads(arguments: dict[str, Any], impl: str = "triton") -> list[Tensor]:
    def assemble(context: Tensor, mask_token: Tensor) -> Tensor:
        return ops.predictor_tokens(**{**arguments, "context": context, "mask_token": mask_token}, impl=impl)

    return run(assemble, arguments["context"], arguments["mask_token"])


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def strided(x: Tensor) -> Tensor:
    """The same values at other places."""
    if x.ndim == 1:
        return torch.stack([x, x], dim=1)[:, 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


# ---- against the truth


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_predictor_tokens_is_no_worse_than_torch(
    shape: tuple[int, ...], packed: bool, shared: bool, dtype: torch.dtype
) -> None:
    given = token_inputs(shape, packed=packed, shared=shared)
    given["positions"] = given["positions"].to(dtype)

    def fused(context: Tensor, mask_token: Tensor) -> Tensor:
        return ops.predictor_tokens(**{**given, "context": context, "mask_token": mask_token}, impl="triton")

    def plain(context: Tensor, mask_token: Tensor) -> Tensor:
        exact = {"context": context, "mask_token": mask_token, "positions": given["positions"].to(context.dtype)}
        return reference.predictor_tokens(**{**given, **exact})

    # the interpreter adds the rows of a tile one after the other, torch and a GPU in a tree
    factor = 8.0 if DEVICE == "cpu" else 2.0
    assert_no_worse(fused, plain, [given["context"], given["mask_token"]], dtype, factor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_eager_patch_embed_in_fp64_is_the_reference(pixels: str, mode: str) -> None:
    given = patch_inputs(PATCH_SHAPES[2], pixels, mode)
    given = {name: x.double() if name in ("weight", "bias", "positions") else x for name, x in given.items()}
    torch.testing.assert_close(
        ops.patch_embed(**given), reference.patch_embed(**given), rtol=1e-12, atol=1e-12
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_eager_predictor_tokens_are_the_reference(shape: tuple[int, ...], packed: bool, shared: bool) -> None:
    given = token_inputs(shape, packed=packed, shared=shared)
    assert torch.equal(ops.predictor_tokens(**given, impl="eager"), reference.predictor_tokens(**given))


@pytest.mark.parametrize("pixels", PIXELS)
def test_bias_in_fp32_beside_weights_in_16_bits(pixels: str) -> None:
    """As the encoder calls it: the choice must not change types."""
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


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    st.tuples(
        st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20), st.integers(1, 150),
        st.integers(1, 9),
    ),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_predictor_tokens_of_any_shape(shape: tuple[int, ...], packed: bool, shared: bool) -> None:
    given = token_inputs(shape, packed=packed, shared=shared)
    ours, truth = tokens_and_grads(given), tokens_and_grads(given, "eager")
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[0], reference.predictor_tokens(**given))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1, b.abs().max().item()))


# ---- properties that need no tolerance


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
    """Bitwise, with padding between them: zero rows, whose gradient counts for nothing, however large."""
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


@pytest.mark.parametrize("impl", IMPLS)
def test_each_block_is_what_it_would_be_alone(impl: str) -> None:
    given = token_inputs(TOKEN_SHAPES[2])
    tokens = ops.predictor_tokens(**given, impl=impl)
    for block in range(tokens.shape[1]):
        alone = {**given, "target_indices": given["target_indices"][:, block : block + 1]}
        assert torch.equal(ops.predictor_tokens(**alone, impl=impl)[:, 0], tokens[:, block])
        assert torch.equal(ops.predictor_tokens(**{**alone, "shared_context": True}, impl=impl), tokens[:, block])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shared", [False, True])
def test_packed_contexts_of_equal_length_equal_batched_ones(shared: bool, impl: str) -> None:
    given = token_inputs(TOKEN_SHAPES[2], shared=shared)
    batch, kept, _ = given["context"].shape
    packed = given | {
        "context": given["context"].flatten(0, 1),
        "context_indices": given["context_indices"].flatten(),
        "offsets": kept * torch.arange(batch + 1, device=DEVICE, dtype=torch.int32),
    }
    (tokens, context_grad, mask_grad), actual = tokens_and_grads(given, impl), tokens_and_grads(packed, impl)
    assert torch.equal(actual[0], tokens.flatten(0, -2))
    if impl == "triton":
        assert_equal(actual[1:], [context_grad.flatten(0, 1), mask_grad])
    else:  # torch sums in another order
        torch.testing.assert_close(actual[1], context_grad.flatten(0, 1))
        torch.testing.assert_close(actual[2], mask_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_sequence_offsets_cut_the_packed_tokens(shared: bool) -> None:
    given = token_inputs(TOKEN_SHAPES[2], packed=True, shared=shared)
    offsets, (_, blocks, length) = given["offsets"], given["target_indices"].shape
    tokens = ops.predictor_tokens(**given, impl="triton")
    starts = ops.sequence_offsets(offsets, blocks, length, shared)
    assert starts.dtype == torch.int32 and not tokens[int(starts[-1]) :].any()
    parts = [tokens[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
    for image in range(len(offsets) - 1):
        rows = slice(int(offsets[image]), int(offsets[image + 1]))
        alone = given | {
            "context": given["context"][None, rows], "context_indices": given["context_indices"][None, rows],
            "target_indices": given["target_indices"][image : image + 1], "offsets": None,
        }  # fmt: skip
        expected = ops.predictor_tokens(**alone, impl="triton")
        if shared:
            assert torch.equal(parts[image], expected[0])
        else:
            assert_equal(parts[image * blocks : (image + 1) * blocks], list(expected[0]))


@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_integers_are_exact(packed: bool) -> None:
    given = token_inputs(TOKEN_SHAPES[2], packed=packed)
    leaves = [given[name].clone().requires_grad_() for name in ("context", "mask_token")]
    tokens = ops.predictor_tokens(**given | {"context": leaves[0], "mask_token": leaves[1]}, impl="triton")
    upstream = (7 * torch.arange(tokens.numel(), device=DEVICE) % 101 - 50).view(tokens.shape).float()
    context_grad, mask_grad = torch.autograd.grad(tokens, leaves, upstream)
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = {"context": twins[0], "mask_token": twins[1], "positions": given["positions"].double()}
    expected = torch.autograd.grad(reference.predictor_tokens(**given | truth), twins, upstream.double())
    assert torch.equal(context_grad.double(), expected[0]) and torch.equal(mask_grad.double(), expected[1])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_index_dtypes_agree_bitwise(dtype: torch.dtype) -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    assert_equal(embed_and_grads(given | {"indices": given["indices"].to(dtype)}), embed_and_grads(given))
    given = token_inputs(TOKEN_SHAPES[1])
    narrow = {name: given[name].to(dtype) for name in ("context_indices", "target_indices")}
    for impl in IMPLS:
        assert_equal(tokens_and_grads(given | narrow, impl), tokens_and_grads(given, impl))


@pytest.mark.parametrize("mode", ["kept", "packed"])
def test_strided_inputs_agree_bitwise(mode: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1], mode=mode)
    moved = {name: strided(x) if isinstance(x, Tensor) else x for name, x in given.items()}
    assert not any(x.is_contiguous() for x in moved.values() if isinstance(x, Tensor))
    assert_equal(embed_and_grads(moved), embed_and_grads(given))
    given = token_inputs(TOKEN_SHAPES[1], packed=mode == "packed")
    moved = {name: strided(x) if isinstance(x, Tensor) else x for name, x in given.items()}
    assert_equal(tokens_and_grads(moved), tokens_and_grads(given))


def test_strided_upstream_gradients_agree_bitwise() -> None:
    for given, operation, names in [
        (patch_inputs(PATCH_SHAPES[1]), ops.patch_embed, ("weight", "bias")),
        (token_inputs(TOKEN_SHAPES[1]), ops.predictor_tokens, ("context", "mask_token")),
    ]:
        leaves = [given[name].clone().requires_grad_() for name in names]
        out = operation(**{**given, **dict(zip(names, leaves, strict=True))}, impl="triton")
        upstream = wave(out)
        first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        second = torch.autograd.grad(out, leaves, strided(upstream))
        assert_equal(list(first[1:]), list(second[1:]))
        torch.testing.assert_close(first[0], second[0])  # the product may take the other layout another way


# ---- edges


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 24, 9), (2, 0, 2, 4, 24, 9), (2, 3, 2, 0, 24, 9), (2, 3, 0, 4, 24, 9)])
def test_no_tokens(shape: tuple[int, ...], impl: str) -> None:
    batch, kept, blocks, length, width, _ = shape
    given = token_inputs(shape)
    out, context_grad, mask_grad = tokens_and_grads(given, impl)
    assert out.shape == (batch, blocks, kept + length, width) and context_grad.shape == (batch, kept, width)
    expected = wave(out)
    torch.testing.assert_close(context_grad, expected[:, :, :kept].sum(1))
    torch.testing.assert_close(mask_grad.flatten(), expected[:, :, kept:].sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("index", "image"), [(-1, None), (15, None), (2**32 + 3, None), (-1, 0), (0, -2), (0, 3)])
def test_patch_outside_is_loud(index: int, image: int | None) -> None:
    """As NaN in its row and no other; eager as an error, unless the image is counted from the end."""
    given = patch_inputs(PATCH_SHAPES[1], mode="kept" if image is None else "packed")
    given["indices"].view(-1)[5] = index
    if image is not None:
        given["image_of"][5] = image
    out = ops.patch_embed(**given, impl="triton").flatten(0, -2)
    assert out[5].isnan().all() and out.isnan().any(1).sum() == 1
    if DEVICE == "cpu" and image != -2:
        with pytest.raises(IndexError):
            ops.patch_embed(**given, impl="eager")


@pytest.mark.parametrize("bad", [-1, 36, 2**32 + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_token_outside_is_loud(packed: bool, bad: int) -> None:
    for name, rows in [("context_indices", 3), ("target_indices", 1)]:
        given = token_inputs(TOKEN_SHAPES[1], packed=packed)
        given[name].view(-1)[0] = bad
        out = ops.predictor_tokens(**given, impl="triton").flatten(0, -2)
        assert out.isnan().any(1).sum() == out.isnan().all(1).sum() == rows
        if DEVICE == "cpu":
            with pytest.raises(IndexError):
                ops.predictor_tokens(**given, impl="eager")


def test_offsets_beyond_the_context_write_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonsense on the device cannot be refused without waiting for it, but must not touch other memory."""
    given = token_inputs(TOKEN_SHAPES[1], packed=True)
    given["offsets"] += 20
    memory: list[Tensor] = []

    def allocate(*size: Any, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 else size
        memory.append(torch.full((3, *shape), 7.0, **options))
        return memory[-1][1]

    monkeypatch.setattr(torch, "empty", allocate)
    ops.predictor_tokens(**given, impl="triton")
    monkeypatch.undo()
    (tokens,) = memory
    assert (tokens[::2] == 7).all() and not (tokens[1] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_images_and_positions_get_no_gradient(impl: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1], "float")
    given["images"].requires_grad_()
    given["weight"].requires_grad_()
    ops.patch_embed(**given, impl=impl).sum().backward()
    assert given["weight"].grad is not None and given["images"].grad is None
    tokens = token_inputs(TOKEN_SHAPES[1])
    for operation, arguments in ((ops.patch_embed, given), (ops.predictor_tokens, tokens)):
        arguments["positions"].requires_grad_()
        with pytest.raises(ValueError, match="positions require a gradient"):
            operation(**arguments, impl=impl)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_of_weight_and_bias_may_be_frozen(trained: str) -> None:
    given = patch_inputs(PATCH_SHAPES[1])
    both = dict(zip(("weight", "bias"), embed_and_grads(given)[1:], strict=True))
    leaf = given[trained].requires_grad_()
    out = ops.patch_embed(**given, impl="triton")
    assert torch.equal(torch.autograd.grad(out, leaf, wave(out))[0], both[trained])


# ---- registration, compilation, counting


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


@pytest.mark.parametrize("packed", [False, True])
def test_predictor_tokens_registration(packed: bool) -> None:
    given = token_inputs((2, 5, 3, 4, 24, 9), packed=packed)
    context, mask_token = given["context"].requires_grad_(), given["mask_token"].flatten().requires_grad_()
    rest = [given[name] for name in ("positions", "context_indices", "target_indices", "offsets")]
    rest.append(None)
    torch.library.opcheck(door._predictor_tokens, (context, mask_token, *rest))
    grads = wave(door._predictor_tokens(context, mask_token, *rest).detach())
    backward = (grads, given["target_indices"], given["offsets"], list(context.shape), None)
    torch.library.opcheck(door._predictor_tokens_backward, backward)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[str, str]]] = {
    **{
        f"patch_embed {mode}": (ops.patch_embed, patch_inputs(PATCH_SHAPES[1], mode=mode), ("weight", "bias"))
        for mode in MODES
    },
    **{
        f"predictor_tokens{' packed' * packed}{' shared' * shared}": (
            ops.predictor_tokens,
            token_inputs(TOKEN_SHAPES[1], packed=packed, shared=shared),
            ("context", "mask_token"),
        )
        for packed in (False, True)
        for shared in (False, True)
    },
}


def case(name: str, impl: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An operation as a function of what it differentiates, with something around it to compile."""
    operation, arguments, names = CASES[name]

    def f(*leaves: Tensor) -> Tensor:
        return operation(**{**arguments, **dict(zip(names, (1.5 * x for x in leaves), strict=True))}, impl=impl) + 1

    return f, [arguments[leaf] for leaf in names]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_graph(name: str, impl: str) -> None:
    """Without graph break, so without waiting for the device; the choice is made while tracing."""
    torch.compiler.reset()
    f, leaves = case(name, impl)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, *leaves), run(f, *leaves))


@pytest.mark.parametrize("name", CASES)
def test_under_activation_checkpointing(name: str) -> None:
    f, leaves = case(name, "triton")

    def again(*leaves: Tensor) -> Tensor:
        out = checkpoint(f, *leaves, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    assert_equal(run(again, *leaves), run(f, *leaves))


@pytest.mark.parametrize("name", CASES)
def test_flops_do_not_depend_on_the_implementation(name: str) -> None:
    counts = []
    for impl in IMPLS:
        f, leaves = case(name, impl)
        with FlopCounterMode(display=False) as counter:
            run(f, *leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] and (counts[0] > 0) == name.startswith("patch")


def test_backward_twice_gives_the_same_gradient() -> None:
    for name in CASES:
        f, leaves = case(name, "triton")
        assert_equal(run(f, *leaves), run(f, *leaves))


# ---- refusals and choice


def test_impl_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, tokens = patch_inputs(PATCH_SHAPES[1]), token_inputs(TOKEN_SHAPES[1])
    for operation, given, name in (
        (ops.patch_embed, patches, "weight"), (ops.predictor_tokens, tokens, "context"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="unknown impl 'cuda'"):
            operation(**given, impl="cuda")
        double = given | {name: given[name].double()}
        with pytest.raises(UserError, match=rf"cannot run {operation.__name__}: dtypes torch\.float64 are not"):
            operation(**double, impl="triton")
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            with pytest.raises(UserError, match="tensors are on cpu"):
                operation(**{n: x.cpu() if isinstance(x, Tensor) else x for n, x in given.items()}, impl="triton")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, 4, 192)}, r"context \(2, 4, 192\), context_indices \(2, 5\)"),
        ({"target_indices": torch.zeros(2, 3, dtype=torch.int64)}, r"target_indices \(2, 3\) are not"),
        ({"target_indices": torch.zeros(1, 3, 7, dtype=torch.int64)}, "context is of 2 images, target_indices of 1"),
        ({"target_indices": torch.zeros(2, 3, 7)}, r"target_indices is torch\.float32"),
        ({"context_indices": torch.zeros(2, 5, dtype=torch.bool)}, r"context_indices is torch\.bool"),
        ({"positions": torch.zeros(36, 191)}, r"wants positions \[N, 192\].*got \(36, 191\)"),
        ({"mask_token": torch.zeros(191)}, r"a mask token of 192, got .* \(191,\)"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"nor with offsets \[T, D\] and \[T\]"),
        ({"positions": torch.zeros(36, 192, device="meta")}, "positions is on meta, expected"),
    ],
)
def test_predictor_tokens_refuses(change: dict[str, Any], message: str) -> None:
    moved = {n: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.predictor_tokens(**token_inputs(TOKEN_SHAPES[1]) | moved)
    packed = token_inputs(TOKEN_SHAPES[1], packed=True)
    with pytest.raises(ValueError, match=r"offsets are torch\.int64 \(3,\), want torch\.int32 \(3,\)"):
        ops.predictor_tokens(**packed | {"offsets": packed["offsets"].long()})


# ---- the networks


def networks(kernels: str) -> tuple[Encoder, Predictor]:
    torch.manual_seed(0)
    encoder = Encoder(VitShape(32, 1, 2), 16, 4, kernels=kernels)
    predictor = Predictor(VitShape(16, 1, 2), 32, encoder.grid, kernels=kernels)
    for parameter in (*encoder.parameters(), *predictor.parameters()):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.to(DEVICE), predictor.to(DEVICE)


@pytest.mark.parametrize("pixels", PIXELS)
def test_networks_compute_the_same_with_either_implementation(pixels: str) -> None:
    """Outputs and the gradient of every parameter; one state dict fits both."""
    given = patch_inputs((2, 16, 16, 4, 32, 6), pixels)
    targets = token_inputs((2, 1, 3, 4, 16, 16))["target_indices"].short()
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
    for shared_start, operation in ((True, "predictor_rows"), (False, "predictor_tokens")):
        predictor.shared_start, predictor.predictor_embed.kernels = shared_start, "auto"
        with pytest.raises(UserError, match=f"unknown impl 'cuda' for {operation}"):
            predictor(torch.zeros(2, 6, 32, device=DEVICE), given["indices"], given["indices"][:, None])
