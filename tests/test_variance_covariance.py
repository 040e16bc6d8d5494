"""VICReg's variance and covariance terms: both forms, torch and kernels (interpreted without a GPU), 1 to 4 ranks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast import ops, reference
from cjepa_fast.distributed import gather_rows
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _choice
from cjepa_fast.ops import _variance_covariance as door
from oracle import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["covariance", "gram"]
# The interpreter truncates to bf16 where hardware rounds, so only a GPU tests 16 bits.
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.float16, marks=pytest.mark.gpu),
]
# (N, V, D): aligned; ragged; nothing a multiple of anything, wider than long; fewest rows; one column; a reduction
# longer than the provisional mean's sample and worth splitting
SHAPES = [(64, 2, 64), (96, 1, 80), (37, 3, 71), (2, 2, 5), (9, 2, 1), (530, 1, 33)]
SMALL = (21, 3, 35)


def inputs(shape: tuple[int, int, int], shift: float = 0.5) -> Tensor:
    """Return correlated columns with standard deviations on both sides of the hinge, views of different scale, fp64."""
    rows, views, width = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    z = z + 0.5 * torch.randn(rows, views, 1, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.3, 2, width, dtype=torch.float64)
    return (scale * torch.linspace(1, 0.7, views, dtype=torch.float64)[:, None] * (z + shift)).to(DEVICE)


def combined(f: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Callable[[Tensor], Tensor]:
    """Return both terms of all views as one tensor [2 V] in the argument's dtype."""
    return lambda z: torch.cat(f(z, **options)).to(z.dtype)


def weigh(terms: Tensor) -> Tensor:
    """Return a scalar in which every term of every view has its own weight."""
    return (torch.arange(1, 1 + len(terms), dtype=terms.dtype, device=terms.device).sin() * terms).sum()


def terms_and_grad(z: Tensor, form: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    std, cov = ops.variance_covariance(leaf, form=form, impl=impl)
    (grad,) = torch.autograd.grad(weigh(torch.cat([std, cov])), leaf)
    return std, cov, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_no_worse_than_torch(shape: tuple[int, int, int], form: str, dtype: torch.dtype) -> None:
    assert_no_worse(
        combined(ops.variance_covariance, form=form, impl="triton"),
        combined(reference.variance_covariance),
        [inputs(shape)],
        dtype,
    )


@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_each_term_alone(shape: tuple[int, int, int], form: str, term: int) -> None:
    """So that neither term hides an error of the other."""
    assert_no_worse(
        lambda z: ops.variance_covariance(z, form=form, impl="triton")[term],
        lambda z: reference.variance_covariance(z)[term], [inputs(shape)], torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager_in_fp64_is_the_reference(shape: tuple[int, int, int], form: str) -> None:
    z, again = inputs(shape).requires_grad_(), inputs(shape).requires_grad_()
    ours, truth = ops.variance_covariance(z, form=form, impl="eager"), reference.variance_covariance(again)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
        for name, a, b in zip(("std", "cov"), ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
        upstream = [w * torch.arange(1, 1 + shape[1], dtype=torch.float64, device=DEVICE).sin() for w in weights]
        (grad,) = torch.autograd.grad(ours, z, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(truth, again, upstream, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_eager_in_fp32_is_no_worse_than_the_reference(form: str) -> None:
    for shape in SHAPES[:5]:  # not the last: |Zc Zc^T|^2 cancels if rows are many
        ours = combined(ops.variance_covariance, form=form, impl="eager")
        assert_no_worse(ours, combined(reference.variance_covariance), [inputs(shape)], torch.float32)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_large_means(form: str, impl: str) -> None:
    """Up to mean / sigma = 64, where raw second moments in fp32 would be off by several percent."""
    base = torch.randn(270, 1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mean in (8, 64):
        z = (0.8 * (base + mean)).to(DEVICE).float()
        truth = terms_and_grad(z.double(), form, "eager")
        for ours, true in zip(terms_and_grad(z, form, impl), truth, strict=True):
            assert (ours.double() - true).abs().max() <= 1e-4 * true.abs().max()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_provisional_mean_is_corrected(impl: str) -> None:
    """Rows ordered such that the first 256 have another mean than the rest."""
    z = inputs((300, 1, 20), shift=0).float()
    z[256:] += 3
    truth = terms_and_grad(z.double(), "covariance", "eager")
    for ours, true in zip(terms_and_grad(z, "covariance", impl), truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_more_block_columns_than_a_group(form: str) -> None:
    """Ten block columns of 64 in groups of 8: some program computes every tile, also in the last group."""
    shape = (3, 1, 600) if form == "covariance" else (600, 1, 3)
    z = inputs(shape, shift=0).float()
    truth = terms_and_grad(z.double(), "covariance", "eager")
    for ours, true in zip(terms_and_grad(z, form, "triton"), truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_agree(form: str, impl: str) -> None:
    """Rows with gaps, views of a wider row, views before rows, and a last dimension that must be copied."""
    z = inputs(SMALL).float()
    expected = terms_and_grad(z, form, impl)
    wide = torch.cat([z + 7, z, z - 7], dim=2)[:, :, z.shape[2] : 2 * z.shape[2]]
    layouts = [
        z.repeat_interleave(2, dim=0)[::2],
        wide,
        z.transpose(0, 1).contiguous().transpose(0, 1),
        z.transpose(0, 2).contiguous().transpose(0, 2),
    ]
    for strided in layouts:
        assert torch.equal(strided, z) and not strided.is_contiguous()
        for ours, same in zip(terms_and_grad(strided, form, impl), expected, strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-6, atol=1e-8)


def test_strided_kernel_input_agrees_bitwise_and_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    z = inputs(SHAPES[1]).float()
    expected = terms_and_grad(z, "covariance", "triton")
    strided = z.repeat_interleave(2, dim=0)[::2]
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied") if self.ndim == 3 else self)
    ours = terms_and_grad(strided, "covariance", "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_properties(form: str, impl: str) -> None:
    z = inputs(SMALL).float()
    std, cov, grad = terms_and_grad(z, form, impl)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    permuted = terms_and_grad(z[order], form, impl)
    shifted = terms_and_grad(z + 3, form, impl)
    for ours in (permuted, (*shifted[:2], shifted[2][order])):
        for a, b in zip(ours, (std, cov, grad[order]), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)
    again = terms_and_grad(z, form, impl)
    assert all(torch.equal(a, b) for a, b in zip(again, (std, cov, grad), strict=True))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_collapsed_rows(value: float, form: str, impl: str) -> None:
    std, cov, grad = terms_and_grad(torch.full((20, 2, 12), value, device=DEVICE), form, impl)
    assert not cov.any() and not grad.any()
    torch.testing.assert_close(std, torch.full_like(std, 1 - 1e-2))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_hinge(form: str, impl: str) -> None:
    """Columns +-s have standard deviation s sqrt(4/3) of 4 rows; orthogonal ones no covariance: all by hand."""
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float32, device=DEVICE)
    spread = (0.75 * signs * torch.tensor([2.0, 2.0, 2.0], device=DEVICE))[:, None]
    std, cov, grad = terms_and_grad(spread, form, impl)
    assert std.item() == 0 and cov.item() == pytest.approx(0, abs=1e-6) and grad.abs().max() < 1e-6
    narrow = spread * torch.tensor([1.0, 0.1, 1.0], device=DEVICE)
    std, _, grad = terms_and_grad(narrow, form, impl)
    deviation = (0.15**2 * 4 / 3 + 1e-4) ** 0.5
    assert std.item() == pytest.approx((1 - deviation) / 3, rel=1e-6)
    expected = -torch.sin(torch.tensor(1.0)).item() * narrow[:, :, 1] / (3 * deviation * 3)
    torch.testing.assert_close(grad[:, :, 1], expected, rtol=1e-5, atol=1e-6)
    assert grad[:, :, ::2].abs().max() < 1e-6


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_corner_of_the_hinge_has_no_gradient(form: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a standard deviation of exactly 1, as torch's relu."""
    monkeypatch.setattr(door, "STD_EPS", 0.25)
    z = torch.tensor([0.75, -0.75, 0.75, -0.75, 0.0], device=DEVICE)  # sum of squares 2.25 over 3 is 0.75
    z = z[:4, None, None]
    assert z.var(dim=0).item() == 0.75
    std, _, grad = terms_and_grad(z, form, impl)
    assert std.item() == 0 and not grad.any()


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_nan_is_loud(form: str, impl: str) -> None:
    z = inputs(SMALL).float()
    z[3, 1, 5] = float("nan")
    std, cov, grad = terms_and_grad(z, form, impl)
    assert std.isnan().tolist() == cov.isnan().tolist() == [False, True, False]
    assert grad[:, 1].isnan().any() and grad[:, ::2].isfinite().all()


class Allocations(TorchDispatchMode):
    """The new storages of the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}  # a held storage keeps its address from reuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return out

    def bytes_beyond(self, *known: Tensor) -> int:
        given = {tensor.untyped_storage().data_ptr() for tensor in known}
        return sum(storage.nbytes() for address, storage in self.seen.items() if address not in given)


@pytest.mark.parametrize("form", FORMS)
def test_memory(form: str) -> None:
    """Forward: matrix and partial tiles; backward: the gradient; no centred copy, no second matrix, little else."""
    from cjepa_fast.kernels import variance_covariance as kernel

    z = inputs((256, 2, 128) if form == "covariance" else (128, 2, 256)).float()
    rows, views, width = z.shape
    side = min(rows, width)
    with Allocations() as forward:
        _, *saved = kernel.fwd(z, 0, rows, rows, form == "gram", True, 1.0, 1e-4, dist.all_reduce)
    tile, tiles, splits, group, _ = kernel._product_schedule(z.dtype, side, side, max(rows, width), views)
    matrix, partials = views * side * side, splits * group * tiles * tile["BLOCK"] ** 2
    assert forward.bytes_beyond(z) <= 4 * (matrix + partials + 10 * views * width)
    with Allocations() as backward:
        kernel.bwd(torch.ones(2, views, device=DEVICE), z, 0, rows, rows, 1.0, *saved)
    assert backward.bytes_beyond(z, *saved) <= 4 * (z.numel() + 2 * views)
    with Allocations() as eager:
        leaf = z.clone().requires_grad_()
        weigh(combined(reference.variance_covariance)(leaf)).backward()
    assert eager.bytes_beyond(z) > 3 * (forward.bytes_beyond(z) + backward.bytes_beyond(z, *saved))


def test_partial_tiles_are_bounded() -> None:
    from cjepa_fast.kernels import variance_covariance as kernel

    for dtype in (torch.bfloat16, torch.float32):
        for views, length, width in ((1, 64, 96), (4, 2048, 384), (4, 1 << 20, 96), (4, 8192, 2048), (2, 4096, 8192)):
            tile, tiles, splits, group, chunk = kernel._product_schedule(dtype, width, width, length, views)
            one = 4 * tile["BLOCK"] ** 2
            assert splits * group * tiles * one <= max(32 << 20, tiles * one)
            assert (splits - 1) * chunk < length <= splits * chunk


@pytest.mark.parametrize("form", FORMS)
def test_views_taken_one_after_the_other_agree_bitwise(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the partial tiles of all views together took too much memory."""
    from cjepa_fast.kernels import variance_covariance as kernel

    z = inputs(SMALL).float()
    expected = terms_and_grad(z, form, "triton")
    monkeypatch.setattr(kernel, "MAX_PARTIALS", 0)
    assert kernel._product_schedule(z.dtype, 99, 99, 99, 3)[3] == 1
    assert all(torch.equal(a, b) for a, b in zip(terms_and_grad(z, form, "triton"), expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_stored_without_gradient(form: str) -> None:
    z = inputs(SHAPES[1]).float()
    for with_grad in (False, True):
        stored = door._variance_covariance(z, len(z), form, with_grad)[1:4]
        assert [tensor.numel() > 0 for tensor in stored] == [with_grad] * 3
    leaf = z.clone().requires_grad_()
    expected = ops.variance_covariance(leaf, form=form, impl="triton")
    with torch.no_grad():
        ours = ops.variance_covariance(leaf, form=form, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_grad", [False, True])
def test_registration(form: str, with_grad: bool) -> None:
    z = inputs((9, 2, 12)).float()
    arguments = (z.requires_grad_(with_grad), 9, form, with_grad)
    torch.library.opcheck(door._variance_covariance, arguments)
    if with_grad:
        _, *saved = (tensor.detach() for tensor in door._variance_covariance(*arguments))
        upstream = torch.tensor([[0.7, -0.2], [0.1, 1.3]], device=DEVICE)
        torch.library.opcheck(door._variance_covariance_backward, (upstream, z.detach(), *saved, 9))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_and_checkpointed(form: str, impl: str) -> None:
    """No graph break; backward recomputes."""
    z = inputs(SHAPES[1]).float()
    terms = combined(ops.variance_covariance, form=form, impl=impl)

    def loss(x: Tensor) -> Tensor:
        return weigh(terms(x * 1.5))

    def run(f: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        value = f(leaf)
        return value, torch.autograd.grad(0.3 * value, leaf)[0]

    expected = run(loss)
    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    checkpointed = run(lambda x: checkpoint(loss, x, use_reentrant=False))
    for ours in (compiled, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_flops_do_not_depend_on_the_implementation(form: str) -> None:
    z = inputs(SHAPES[1]).float().requires_grad_()
    counts = []
    for impl in ("eager", "triton"):
        with FlopCounterMode(display=False) as counter:
            weigh(combined(ops.variance_covariance, form=form, impl=impl)(z)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_cheaper_form() -> None:
    """On one rank the smaller matrix; on several the smaller traffic, 4 D^2 bytes against n D elements."""
    form = ops.variance_covariance_form
    assert form(2048, 384, 1, 4) == "covariance" and form(256, 384, 1, 4) == "gram"
    assert form(384, 384, 1, 4) == "covariance"
    assert form(256, 384, 8, 2) == "covariance" and form(256, 8192, 8, 2) == "gram"
    z = inputs((20, 1, 30)).requires_grad_()
    assert torch.equal(*(ops.variance_covariance(z, form=form)[1] for form in ("auto", "gram")))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    z = inputs(SHAPES[1]).float()
    for wrong in (z[0], z[:, :0], z[..., :0], z.long()):
        with pytest.raises(ValueError, match=r"z wants floats \[N, V, D\]"):
            ops.variance_covariance(wrong)
    with pytest.raises(ValueError, match="unknown form 'dual' of variance_covariance; known: auto, covariance, gram"):
        ops.variance_covariance(z, form="dual")
    for rows in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images, got {rows}"):
            ops.variance_covariance(z[:rows])
    with pytest.raises(UserError, match="unknown impl 'cuda'"):
        ops.variance_covariance(z, impl="cuda")
    with pytest.raises(UserError, match=r"cannot run variance_covariance: dtypes torch\.float64"):
        ops.variance_covariance(z.double(), impl="triton")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(UserError, match="tensors are on cpu"):
            ops.variance_covariance(z.cpu(), impl="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.variance_covariance(z, impl="triton")
    assert ops.variance_covariance(z)[0].isfinite().all()


def test_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    z = inputs(SHAPES[3]).float()
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        for _ in range(2):
            ops.variance_covariance(z.cpu())
            ops.variance_covariance(z, impl="triton")
    assert caplog.messages == [
        "variance_covariance: eager (the tensors are on cpu)", "variance_covariance: triton (asked for)"
    ]  # fmt: skip


CASES = [
    ("eager", torch.float64, (12, 2, 6)),
    ("eager", torch.float64, (8, 3, 21)),
    ("eager", torch.float32, (16, 1, 9)),
]
FUSED = [
    ("triton", torch.float32, (16, 2, 9)),
    ("triton", torch.float32, (560, 1, 5)),
    ("triton", torch.float32, (6, 2, 70)),
]


def worker(rank: int, size: int, folder: str) -> None:
    """Save the terms of every rank and the gathered gradients of the mean of all ranks' losses."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[Any, Any] = {}
    for form in FORMS:
        for impl, dtype, shape in [*CASES, *(FUSED if size == 2 else [])]:
            share = inputs(shape, shift=4).cpu().to(dtype).chunk(size)[rank]
            std, cov, grad = terms_and_grad(share, form, impl)
            found[form, impl, dtype, shape] = [gather_rows(torch.stack([std, cov])[None]), gather_rows(grad) / size]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_what_one_computes(size: int, tmp_path: Path) -> None:
    """FSDP2's average over ranks is the gradient of the undivided batch, in both forms."""
    mp.spawn(worker, (size, str(tmp_path)), nprocs=size)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 2 * (len(CASES) + (len(FUSED) if size == 2 else 0))
    for (form, impl, dtype, shape), (terms, grad) in found.items():
        z = inputs(shape, shift=4).cpu().to(dtype).double()
        std, cov, expected = terms_and_grad(z, "covariance", "eager")
        rtol = 1e-9 if dtype == torch.float64 else 2e-5
        where = f"{form} {impl} {dtype} {shape}"
        for row in terms:
            torch.testing.assert_close(row.double(), torch.stack([std, cov]), rtol=rtol, atol=rtol / 100, msg=where)
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < rtol, f"{where}: gradient differs by {error:.1e}"
