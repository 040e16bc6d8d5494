"""N processes compute what one computes: gradients of the whole loss under FSDP2, statistics, checkpoints, teacher."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from cjepa_fast import distributed
from cjepa_fast.engine.optim import AdamW, parameter_groups
from cjepa_fast.engine.step import forward_backward
from cjepa_fast.errors import UserError
from cjepa_fast.losses import block_vicreg, context_target_vicreg
from cjepa_fast.methods.jepa import Jepa
from cjepa_fast.networks.heads import GlobalBatchNorm
from cjepa_fast.run import checkpoint
from test_step import batch, networks, whole_targets


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Layout(NamedTuple):
    """Processes, those that share one copy of the state, and whether weights are freed after the forward pass."""

    size: int
    shards: int
    reshard: bool = False
    checkpoint: bool = False


LAYOUTS = {
    "2": Layout(2, 2),
    "4": Layout(4, 4),
    "hybrid": Layout(4, 2),
    "hybrid ZeRO-3": Layout(4, 2, reshard=True, checkpoint=True),
    "replicas": Layout(4, 1),
}


def sharded(layout: Layout, views: str = "target_blocks") -> Jepa:
    net = networks(dtype=torch.float64, views=views)
    mesh = distributed.mesh("cpu", layout.shards)
    assert net.projector is not None
    if layout.checkpoint:
        for block in (*net.encoder.blocks, *net.predictor.predictor_blocks):
            distributed.checkpoint_activations(block)
    for network, blocks, reshard in (
        (net.encoder, net.encoder.blocks, layout.reshard),
        (net.predictor, net.predictor.predictor_blocks, layout.reshard),
        (net.projector, [], layout.reshard),
        (net.target_encoder, net.target_encoder.blocks, True),
    ):
        distributed.shard(network, list(blocks), mesh, unit=1, reshard=reshard, dtype=torch.float64)
    return net


def one_step(net: Jepa, rank: int, size: int, accumulate: int) -> dict[str, Any]:
    """Gradients, terms, updated weights and the teacher's next output for the global batch of step 0, on all ranks."""
    images, masks = batch(0, 16, parts=accumulate, rank=rank, ranks=size, union=not net.needs_all_targets)
    optimizer = AdamW(parameter_groups(net), lr=1e-2, averages=net.averages())
    out = forward_backward(net, images, masks)
    assert out.predictions is not None
    grads = {name: full(p.grad).clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step(momentum=0.5)
    return {
        "terms": distributed.mean_over_ranks(torch.cat([out.loss[None], out.terms])),
        "grads": grads,
        "weights": {name: full(p.detach()).clone() for name, p in net.named_parameters()},
        "targets": distributed.gather_rows(whole_targets(net, images)),
        "predictions": distributed.gather_rows(out.predictions),
    }


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout.size == size}
    for name, layout in layouts.items():
        results[name] = {}
        for views in ("target_blocks", "context_target"):
            for accumulate in (1, 2):
                net = sharded(layout, views)
                step = one_step(net, rank, size, accumulate)
                results[name][f"{views}-{accumulate}"] = step
                assert all(isinstance(p, DTensor) for p in net.target_encoder.parameters()), (
                    "the teacher stays gathered"
                )

    # statistics: every rank's gradient of mean-over-ranks losses against the undivided batch
    statistics = results["2" if size == 2 else "4"]
    z = (torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0)) + 8).chunk(size)[rank].requires_grad_()
    sim, std, cov = block_vicreg(z)
    (sim + 2 * std + 3 * cov).backward()
    statistics["vicreg"] = [distributed.gather_rows(x) for x in (torch.stack([sim, std, cov])[None], z.grad)]
    sim, std, cov = context_target_vicreg(z[:, 0], z[:, 1].detach())
    statistics["context_target"] = distributed.gather_rows(torch.stack([sim, std, cov])[None])
    norm = GlobalBatchNorm(6)
    y = (torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 3 + 8).chunk(size)[rank].requires_grad_()
    (norm(y) * torch.sin(torch.arange(96.0)).view(16, 6).chunk(size)[rank]).sum().backward()
    statistics["norm"] = distributed.gather_rows(y.grad)

    results["2" if size == 2 else "4"]["faults"] = checkpoint_faults(rank, Path(folder))

    mine, other = ("2", "hybrid") if size == 2 else ("hybrid", "2")  # each loads what the other saves
    results[mine]["saved"] = save(layouts[mine], rank, f"{folder}/../{mine}")
    loader = layouts["2" if size == 2 else "4"]
    results[mine]["loaded"] = load(loader, f"{folder}/../{other}")
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def save(layout: Layout, rank: int, folder: str) -> dict[str, torch.Tensor]:
    net = sharded(layout)
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-2, fused=True)
    forward_backward(net, *batch(0, 16, rank=rank, ranks=layout.size))
    optimizer.step()
    state = checkpoint.training_state(net, optimizer)
    checkpoint.save(Path(folder), 7, state, keep=2, extra={"a": 1})
    return {name: full(tensor).clone() for name, tensor in state.items()}


def checkpoint_faults(rank: int, folder: Path) -> list[Any]:
    """On every rank: which checkpoint is loaded where the newest is damaged, the files read for that, and a refusal."""
    state = {name: torch.full((300,), 1.0) for name in "abc"}
    for step in (1, 2):
        checkpoint.save(folder / "damaged", step, state, keep=2, extra={})
    newest = folder / "damaged" / "step-00000002"
    if rank == 0:
        victim = max(newest.glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
        (folder / "file").write_text("")
    dist.barrier()
    read: list[str] = []
    crc32 = checkpoint._crc32
    checkpoint._crc32 = lambda path: read.append(f"{path.parent.name}/{path.name}") or crc32(path)
    loaded, _ = checkpoint.load(folder / "damaged", state)
    checkpoint._crc32 = crc32
    try:
        checkpoint.save(folder / "file" / "none", 1, state, keep=2, extra={})
        refusal = ""
    except UserError as error:
        refusal = str(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (loaded, read, refusal))
    return found


def fresh_state(net: Jepa) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(parameter_groups(net))
    checkpoint.init_state(optimizer)
    return checkpoint.training_state(net, optimizer)


def load(layout: Layout, folder: str) -> dict[str, torch.Tensor]:
    net = sharded(layout)
    state = fresh_state(net)
    while not (Path(folder) / "step-00000007").exists():  # which comes to be by a rename
        time.sleep(0.1)
    assert checkpoint.load(Path(folder), state) == (7, {"a": 1})
    return {name: full(tensor).clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("ranks")
    groups = []
    for size in (2, 4):
        (root / f"of-{size}").mkdir()
        groups.append(mp.spawn(worker, (size, str(root / f"of-{size}")), nprocs=size, join=False))
    while not all([group.join(timeout=1) for group in groups]):  # both, so that a failure of either ends it
        pass
    found = [torch.load(root / f"of-{size}" / "results.pt") for size in (2, 4)]
    return {**found[0], **found[1], "root": root}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_step(results: dict[str, Any], name: str, views: str, accumulate: int) -> None:
    theirs = results[name][f"{views}-{accumulate}"]
    ours = one_step(networks(dtype=torch.float64, views=views), 0, 1, 1)
    torch.testing.assert_close(theirs["terms"], ours["terms"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(theirs["predictions"], ours["predictions"], rtol=1e-10, atol=1e-12)
    assert theirs["grads"].keys() == ours["grads"].keys()
    for key, grad in ours["grads"].items():
        error = (theirs["grads"][key] - grad).norm() / grad.norm()
        assert error < 1e-9, f"{key}: gradient differs by {error:.1e}"
    for key, weight in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][key], weight, rtol=1e-5, atol=1e-7, msg=key)
    torch.testing.assert_close(theirs["targets"], ours["targets"], rtol=1e-4, atol=1e-5)
    stale = whole_targets(networks(dtype=torch.float64), batch(0, 16)[0])
    assert (ours["targets"] - stale).abs().max() > 0.02  # the comparison above would notice a stale teacher


@pytest.mark.parametrize("name", ["2", "4"])
def test_batch_statistics(results: dict[str, Any], name: str) -> None:
    z = (torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0)) + 8).double().requires_grad_()
    terms = block_vicreg(z)
    (terms[0] + 2 * terms[1] + 3 * terms[2]).backward()
    found, grad = results[name]["vicreg"]
    for row in found:  # every rank holds the global value
        torch.testing.assert_close(row.double(), torch.stack(terms), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        grad.double() / LAYOUTS[name].size, z.grad, rtol=1e-4, atol=1e-7
    )  # FSDP2 divides by the size
    truth = torch.stack(context_target_vicreg(z[:, 0], z[:, 1]))
    for row in results[name]["context_target"]:
        torch.testing.assert_close(row.double(), truth, rtol=1e-5, atol=1e-7)
    y = (torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 3 + 8).double().requires_grad_()
    normed = torch.nn.functional.batch_norm(y, None, None, training=True)
    (normed * torch.sin(torch.arange(96.0)).view(16, 6)).sum().backward()
    torch.testing.assert_close(results[name]["norm"].double(), y.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("saver", "loader"), [("2", "hybrid"), ("hybrid", "2")])
def test_checkpoints_fit_any_layout(results: dict[str, Any], saver: str, loader: str) -> None:
    """Those of two processes fit one and four; those of two copies on four processes fit one and two."""
    net = networks(dtype=torch.float64)
    state = fresh_state(net)
    assert checkpoint.load(results["root"] / saver, state) == (7, {"a": 1})
    saved = results[saver]["saved"]
    assert any(name.startswith("optimizer.") and tensor.abs().sum() > 0 for name, tensor in saved.items())
    for loaded in (state, results[loader]["loaded"]):
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("name", ["2", "4"])
def test_faults_of_checkpoints_are_the_same_for_all_ranks(results: dict[str, Any], name: str) -> None:
    """Nobody loads another one than the rest, each file is read once, and nobody waits for one that cannot write."""
    loaded, read, refusals = zip(*results[name]["faults"], strict=True)
    assert set(loaded) == {1}
    files = [path for part in read for path in part]
    assert len(files) == len(set(files)) and max(map(len, read)) < len(files)
    assert all("checkpoint not written" in refusal for refusal in refusals)


def test_a_network_without_backward_pass_leaves_no_notes(tmp_path: Path) -> None:
    """FSDP2 notes every forward pass for a backward pass that the target encoder never has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = networks()
        encoder = net.target_encoder
        distributed.shard(encoder, list(encoder.blocks), init_device_mesh("cpu", (1,)), unit=1, reshard=True,
                          dtype=torch.float32)  # fmt: skip
        images, _ = batch(0)
        targets = [whole_targets(net, images) for _ in range(3)]

        def notes() -> int:
            return sum(
                type(thing).__name__ == "FSDPParamGroup" and len(thing._post_forward_indices)
                for thing in gc.get_objects()
            )

        assert notes() >= 3 * len(encoder.blocks), "no notes: this torch needs no help"
        distributed.forget_forwards(encoder)
        assert notes() == 0
        assert torch.equal(whole_targets(net, images), targets[0])
    finally:
        dist.destroy_process_group()
