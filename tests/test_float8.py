"""The target encoder's linear layers in float8: the precision of 3 bits, a scale per row, never stale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cjepa_fast import distributed, ops
from cjepa_fast.config import VitShape
from cjepa_fast.engine.optim import AdamW, parameter_groups
from cjepa_fast.engine.step import train_step
from cjepa_fast.errors import UserError
from cjepa_fast.masks import Masks
from cjepa_fast.methods import jepa
from cjepa_fast.methods.jepa import Jepa, Regularisation
from cjepa_fast.networks import Encoder, Impl, Predictor
from cjepa_fast.networks.heads import Projector
from cjepa_fast.networks.precision import linear_layers
from cjepa_fast.train import main
from masking import make

SHAPE, SIZE, PATCH, BATCH = VitShape(64, 2, 2), 24, 4, 8
SHAPES = [(64, 96, 32), (5, 64, 48), (1, 16, 16)]  # rows, K, N


def scales_rows() -> bool:
    """Return whether torch._scaled_mm scales rows on this machine; in torch 2.11, only on GPUs."""
    one = torch.ones(16, 16).bfloat16()
    try:
        ops.float8_linear(one, *ops.quantise_rows(one), one[0])
    except RuntimeError:
        return False
    return True


needs_scaled_rows = pytest.mark.skipif(not scales_rows(), reason="this torch scales no rows in float8 on a CPU")
IMPLS = ["eager", pytest.param("auto", marks=needs_scaled_rows)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, weight: Tensor, bias: Tensor, impl: str) -> Tensor:
    return ops.float8_linear(x, *ops.quantise_rows(weight), bias, impl=impl)


def test_rounding_is_that_of_three_bits() -> None:
    """Element by element, over the whole range of the type."""
    x = numbers(40, 512) * 10 ** torch.linspace(-9, 9, 40)[:, None] * 2 ** (numbers(40, 512, seed=1) * 4)
    values, scale = ops.quantise_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (40, 1)
    error, back = (values.float() * scale - x).abs(), values.float().abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)).all()
    assert (back.amax(dim=1) == 448).all() and error.max() > 0
    assert torch.equal(values.float().sign() * x.sign(), values.float().abs().sign())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_of_a_product_is_bounded(shape: tuple[int, int, int], impl: str) -> None:
    """The factors' rounding bounds each output's error; a product in 16 bits would err less than the lower bound."""
    rows, columns, width = shape
    x, weight, bias = numbers(rows, columns), numbers(width, columns, seed=1), numbers(width, seed=2)
    truth = x.double() @ weight.double().T + bias.double()
    out = product(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), impl).double()
    error = (out - truth).abs()
    magnitude = x.abs().double() @ weight.abs().double().T
    # (1 + 2^-4)^2 - 1 from float8, half of that again for values under the normal range; 2^-8 each from bf16
    assert (error <= 0.2 * magnitude + 2**-7 * (truth.abs() + bias.abs())).all()
    if rows * width > 1000:  # normal factors err by 2.6 % rms each, their product by sqrt(2) times that
        assert 0.03 < (error.square().mean() / truth.square().mean()).sqrt() < 0.045


@needs_scaled_rows
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_their_plain_twin(shape: tuple[int, int, int]) -> None:
    """Only bf16's rounding of the result differs."""
    rows, columns, width = shape
    x, weight, bias = (y.bfloat16() for y in (numbers(rows, columns), numbers(width, columns), numbers(width, seed=2)))
    ours, twin = (product(x, weight, bias, impl).float() for impl in ("auto", "eager"))
    torch.testing.assert_close(ours, twin, rtol=2**-7, atol=2**-7 * float(twin.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_stands_alone(impl: str) -> None:
    """Zeros, outliers, infinities and NaN reach no other row."""
    x, weight, bias = numbers(6, 32), numbers(16, 32, seed=1), numbers(16, seed=2)
    plain = product(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), impl)
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0, 1e30, torch.inf, torch.nan
    out = product(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), impl)
    assert torch.equal(out[0], bias.bfloat16())
    assert out[1].isfinite().all() and not out[2].isfinite().any() and out[3].isnan().all()
    assert torch.equal(out[4:], plain[4:])
    zero = product(x[4:].bfloat16(), torch.zeros(16, 32).bfloat16(), bias.bfloat16(), impl)
    assert torch.equal(zero, bias.bfloat16().expand(2, -1))


@needs_scaled_rows
def test_shapes_of_inputs() -> None:
    x, weight, bias = numbers(3, 5, 32).bfloat16(), numbers(16, 32).bfloat16(), numbers(16).bfloat16()
    assert product(x, weight, bias, "auto").shape == (3, 5, 16)
    assert product(x[:0], weight, bias, "eager").shape == (0, 5, 16)


def networks(float8: str | None, dtype: torch.dtype = torch.bfloat16) -> Jepa:
    torch.manual_seed(0)
    encoder, target_encoder = (Encoder(SHAPE, SIZE, PATCH, dtype=dtype, impl=Impl("eager")) for _ in range(2))
    for parameter in encoder.parameters():  # as initialised, blocks add next to nothing
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    predictor = Predictor(VitShape(32, 2, 2), SHAPE.width, encoder.grid, impl=Impl("eager"))
    net = Jepa(
        encoder, predictor, target_encoder, Projector(SHAPE.width, (24, 24)),
        Regularisation((2.5, 2.5, 0.1), "target_blocks"), prediction="smooth_l1", recoloured=False, kernels="auto",
    )  # fmt: skip
    if float8 is not None:
        net.target_encoder.use_float8(float8)
    return net


@torch.no_grad()
def target_embeddings(encoder: Encoder, images: Tensor, masks: Masks | None = None) -> Tensor:
    return jepa.target_embeddings(encoder, images, masks)


def batch(parts: int = 1, union: bool = True) -> tuple[Tensor, list[Masks]]:
    images = torch.randint(
        0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return images, make(grid=SIZE // PATCH, min_keep=3).sample_parts(0, range(BATCH), parts, union=union)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@needs_scaled_rows
def test_embeddings_are_near_those_in_16_bits() -> None:
    images, _ = batch()
    plain, ours, twin = (target_embeddings(networks(impl).target_encoder, images) for impl in (None, "auto", "eager"))
    assert 0.01 < relative(ours, plain) < 0.1
    # another rounding in bf16 may tip a value to its neighbour in float8
    assert relative(ours, twin) < relative(ours, plain) / 2


def test_cuts_and_parts_change_nothing() -> None:
    """Unions of targets and micro-batches round each token as the whole batch does.

    In fp32 beside float8: rounding in bf16 would tip some values over to float8's next.
    """
    encoder, (images, (masks,)) = networks("eager", torch.float32).target_encoder, batch()
    whole = target_embeddings(encoder, images)
    rows = target_embeddings(encoder, images, masks)
    assert masks.union is not None and masks.union_offsets is not None
    starts = masks.union_offsets.tolist()
    for image, (start, end) in enumerate(itertools.pairwise(starts)):
        assert relative(rows[start:end], whole[image, masks.union[start:end].long()]) < 1e-3
    halves = torch.cat([target_embeddings(encoder, half) for half in images.chunk(2)])
    assert relative(halves, whole) < 1e-3


def test_products_get_whole_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor fails on a GPU with a part of a bias, as the last block's queries would have."""
    encoder, (images, (masks,)), parts = networks("eager", torch.float32).target_encoder, batch(), []
    plain = ops.float8_linear

    def watched(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        parts.append(bias.untyped_storage().nbytes() // bias.nbytes)
        return plain(x, weight, scale, bias, impl=impl)

    monkeypatch.setattr(ops, "float8_linear", watched)
    target_embeddings(encoder, images, masks)
    assert parts == [1] * 4 * SHAPE.depth


@needs_scaled_rows
@pytest.mark.parametrize("parts", [1, 2])
def test_weights_are_rounded_once_a_step_and_follow_the_average(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    net, (images, masks) = networks("auto"), batch(parts, union=False)
    optimizer = AdamW(parameter_groups(net), lr=0.05, averages=net.averages(), impl="eager")
    weights = {layer.weight.shape for layer in linear_layers(net.target_encoder)}
    rounded: list[Tensor] = []
    quantise = ops.quantise_rows

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        rounded.append(x)
        return quantise(x)

    monkeypatch.setattr(ops, "quantise_rows", counted)
    first = train_step(net, optimizer, images, masks, 0.5).embeddings
    assert [tensor.shape in weights for tensor in rounded] == [True] * 4 * SHAPE.depth
    expected = target_embeddings(net.target_encoder, images)  # rounds the weights of the moment in every pass
    second = train_step(net, optimizer, images, masks, 0.5).embeddings
    assert first is not None and second is not None
    assert relative(second, expected) < 5e-3 and relative(first, expected) > 0.05
    assert all(parameter.grad is None for parameter in net.target_encoder.parameters())


def test_sharded_weights_are_rounded_where_they_are_whole(tmp_path: Path) -> None:
    """In a group of one process, in fp32 beside float8: FSDP2 then gathers the weights unrounded."""
    images, _ = batch()
    plain, sharded = (networks("eager", torch.float32).target_encoder for _ in range(2))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        distributed.shard(sharded, list(sharded.blocks), mesh, unit=1, reshard=True, dtype=torch.float32)
        with plain.quantised(), sharded.quantised():
            assert torch.equal(target_embeddings(sharded, images), target_embeddings(plain, images))
    finally:
        dist.destroy_process_group()


@needs_scaled_rows
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_blocks_compute_the_same(dynamic: bool) -> None:
    images, _ = batch()
    plain, compiled = (networks("auto").target_encoder for _ in range(2))
    for block in compiled.blocks:
        block.compile(dynamic=dynamic, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    for step in range(3):
        with plain.quantised(), compiled.quantised():
            assert relative(target_embeddings(compiled, images), target_embeddings(plain, images)) < 5e-3
        if step == 0:
            graphs = counter["unique_graphs"]
    assert graphs > before and counter["unique_graphs"] == graphs, "new weights are no reason to compile again"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.precision", "fp32"], "'float8' needs model.precision bf16, not fp32; use same"),
        (["--model.precision", "bf16", "--runtime.device", "cpu"],
         "float8 needs a GPU of capability 8.9 or more, the run is on cpu; use same"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert main(["--model.target-precision", "float8", "--run.dir", str(out), *more]) == 2
    assert capsys.readouterr().err == f"error: model.target_precision: {message}\n"
    assert not out.exists()


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capability: Any = (8, 9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops.require_float8(torch.device("cuda"))
    capability = (8, 6)
    with pytest.raises(UserError, match=r"of capability 8.9 or more, this one has 8.6; use same"):
        ops.require_float8(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 1280, 5120), (77, 192, 576), (1, 384, 384)], ids=str)
def test_products_on_a_gpu(shape: tuple[int, int, int]) -> None:
    """The tensor cores sum less precisely than fp32."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no float8")
    rows, columns, width = shape
    x, weight, bias = (
        y.cuda().bfloat16() for y in (numbers(rows, columns), numbers(width, columns), numbers(width, seed=2))
    )
    ours, twin = (product(x, weight, bias, impl) for impl in ("auto", "eager"))
    assert relative(ours, twin) < 1e-2
