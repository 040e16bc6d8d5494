"""Between two lines of metrics nothing waits for the device: neither in the main job's loop nor in what it calls."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cjepa_fast.ops._adamw_ema
import cjepa_fast.ops._choice
from cjepa_fast.config import OptimConfig, VitShape
from cjepa_fast.engine.optim import AdamW, parameter_groups
from cjepa_fast.engine.schedules import Length, schedules
from cjepa_fast.engine.step import train_step
from cjepa_fast.masks import Masks, MultiBlockSampler
from cjepa_fast.methods.jepa import Jepa, Regularisation
from cjepa_fast.networks import Encoder, Impl, Predictor
from cjepa_fast.networks.heads import Projector
from cjepa_fast.run.meter import Meter
from cjepa_fast.train import main
from masking import make
from runs import write_images

SIZE, PATCH, BATCH = 24, 4, 8
ON_A_GPU = torch.device("meta")  # stands for one: it has no values either that the host could read
MODES, CONTEXTS, VIEWS = ("fixed", "packed"), ("per_target", "shared"), ("target_blocks", "context_target")

# What asks the device for values, or for as many rows as values say.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "unique_consecutive", "unique_dim", "_unique", "_unique2", "bincount", "_assert_async",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails on an operation that would make the host wait for a GPU, were its tensors there; counts operations.

    Tensors that leave the CPU must come from `pinned`, and none may come back.
    """

    def __init__(self, pinned: set[int] | None = None) -> None:
        super().__init__()
        self.pinned, self.operations, self.copies = set() if pinned is None else pinned, 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        name = operation.overloadpacket.__name__
        assert name not in WAITS, f"{operation} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            chosen = [index for index in args[1] if index is not None]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in chosen), f"{operation} with a mask"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{operation} without output_size"
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs.get("device") or args[0].device) if name == "_to_copy" else (
                args[1], args[0].device
            )  # fmt: skip
            if source.device != target:
                self.copies += 1
                assert source.device.type == "cpu", f"{operation} to the host"
                patient = kwargs.get("non_blocking", len(args) > 2 and args[2])
                assert patient and source.data_ptr() in self.pinned, f"{operation} from memory that is not pinned"
        return operation(*args, **kwargs)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Addresses of what was pinned, which without a GPU nothing can be."""
    addresses, kept = set[int](), list[torch.Tensor]()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        addresses.add(kept[-1].data_ptr())
        return kept[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    yield addresses


def networks(context: str, views: str) -> Jepa:
    shape = VitShape(32, 2, 2)
    encoder, target_encoder = (Encoder(shape, SIZE, PATCH, impl=Impl("eager")) for _ in range(2))
    predictor = Predictor(
        VitShape(16, 2, 2), shape.width, encoder.grid, shared_context=context == "shared", impl=Impl("eager")
    )
    return Jepa(
        encoder, predictor, target_encoder, Projector(shape.width, (24, 24)), Regularisation((2.5, 2.5, 0.1), views),
        prediction="smooth_l1", recoloured=False, kernels="eager",
    )  # fmt: skip


@pytest.mark.parametrize(("parts", "optimizer_impl"), [(1, "triton"), (2, "eager")])
@pytest.mark.parametrize(("mode", "context", "views"), [*itertools.product(MODES, CONTEXTS, VIEWS)])
def test_a_step_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, pinned: set[int], mode: str, context: str, views: str, parts: int,
    optimizer_impl: str,
) -> None:  # fmt: skip
    """Masks' way to the device, both passes, optimizer with averages, meter: on tensors without values."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(cjepa_fast.ops._choice, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(cjepa_fast.ops._adamw_ema, "_launch", lambda *args: None)  # a kernel
    net = networks(context, views).to(ON_A_GPU)
    optimizer = AdamW(parameter_groups(net), averages=net.averages(), impl=optimizer_impl)
    plan = schedules(OptimConfig(), Length(4, 4, 1))
    sampler = make(mode, SIZE // PATCH, min_keep=3)
    meter = Meter((*net.local_terms, *net.batch_terms), BATCH, ON_A_GPU)
    images = torch.zeros(BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device=ON_A_GPU)
    with NoWaiting(pinned) as watch:
        for step in range(2):
            union = views == "target_blocks" and step == 0
            masks = sampler.sample_parts(step, range(BATCH), parts, union=union)
            masks = [part.to(ON_A_GPU) for part in masks]
            out = train_step(net, optimizer, images, masks, plan.apply(optimizer, step))
            meter.add(out, 0.0)
    assert watch.operations > 500 and watch.copies >= 2 * parts * 2


def bounded(monkeypatch: pytest.MonkeyPatch, enter: Any, leave: Any) -> list[int]:
    """Has `enter` called where an interval of metrics begins and `leave` where it ends; the numbers of both calls."""
    calls, restart, verify = [0, 0], Meter.restart, MultiBlockSampler.verify

    def restarted(self: Meter) -> None:
        restart(self)
        calls[0] += 1
        enter()

    def verifying(self: MultiBlockSampler) -> None:
        calls[1] += 1
        leave()
        verify(self)

    monkeypatch.setattr(Meter, "restart", restarted)
    monkeypatch.setattr(MultiBlockSampler, "verify", verifying)
    return calls


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return (
        "--model.encoder vit_demo --model.image-size 24 --model.patch-size 4 --model.predictor-depth 2 "
        "--model.predictor-width 96 --mask.target-scale 0.15 0.2 --mask.min-keep 3 --mask.context-keep None "
        "--loss.vicreg-weight 0.01 --optim.batch-size 8 --optim.steps 9 --optim.warmup-epochs 0.2 --run.log-every 3 "
        f"--runtime.data-threads 1 --data.root {images} --run.dir {out}"
    ).split() + list(more)  # fmt: skip


@pytest.fixture(scope="module")
def images(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 24)


LOOPS = [
    [],
    ["--mask.mode", "packed", "--model.predictor-context", "shared"],
    ["--loss.vicreg-views", "context_target", "--runtime.accumulate", "2"],
]


@pytest.mark.parametrize("more", LOOPS, ids=" ".join)
def test_the_loop_waits_for_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """The main job itself, in whose loop no operation may run that would wait if this were a GPU."""
    watch, active = NoWaiting(), []

    def enter() -> None:
        watch.__enter__()
        active.append(True)

    def leave() -> None:
        active.pop()
        watch.__exit__(None, None, None)

    # batches of 2048 images leave steps with target unions in an interval
    monkeypatch.setattr("cjepa_fast.run.meter.FEATURE_ROWS", 8)
    monkeypatch.setattr(Masks, "trimmed", lambda masks: masks)  # a GPU's keep their padding
    calls = bounded(monkeypatch, enter, leave)
    try:
        code = main(arguments(images, tmp_path / "run", "--runtime.device", "cpu", "--model.precision", "fp32", *more))
    finally:
        while active:
            leave()
    assert code == 0 and calls == [3, 3] and watch.operations > 9 * 200


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [*LOOPS, ["--runtime.cuda-graph", "on", "--loss.vicreg-views", "context_target"]], ids=" ".join
)
def test_the_loop_waits_for_nothing_on_a_gpu(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """As torch sees it, compiled blocks and Triton kernels included; the first interval, which compiles and captures,
    may wait.
    """
    intervals = itertools.count()

    def enter() -> None:
        torch.cuda.set_sync_debug_mode("error" if next(intervals) > 0 else "default")

    monkeypatch.setattr("cjepa_fast.run.meter.FEATURE_ROWS", 8)
    calls = bounded(monkeypatch, enter, lambda: torch.cuda.set_sync_debug_mode("default"))
    # one block size: the later ones would compile later
    sizes = ["--mask.target-scale", "0.17", "0.17", "--mask.target-aspect", "1", "1", "--mask.context-scale", "1", "1"]
    try:
        assert main(arguments(images, tmp_path / "run", "--runtime.device", "cuda", *sizes, *more)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [3, 3]
