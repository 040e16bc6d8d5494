"""N processes compute what one computes: gradients of the whole loss under FSDP2, statistics, checkpoints, teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from cjepa_fast import checkpoint, distributed
from cjepa_fast.losses import GlobalBatchNorm, block_vicreg, context_target_vicreg
from cjepa_fast.optim import AdamW, parameter_groups
from cjepa_fast.step import LossWeights, Networks, forward_backward, target_embeddings
from test_step import WEIGHTS, batch, networks


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded() -> Networks:
    net = networks(dtype=torch.float64)
    for network, blocks, trained in (
        (net.encoder, net.encoder.blocks, True),
        (net.predictor, net.predictor.predictor_blocks, True),
        (net.target_encoder, net.target_encoder.blocks, False),
    ):
        distributed.shard(network, list(blocks), unit=1, trained=trained, dtype=torch.float64)
    assert net.projector is not None
    distributed.shard(net.projector, [], unit=1, trained=True, dtype=torch.float64)
    return net


def one_step(net: Networks, rank: int, size: int, weights: LossWeights, accumulate: int) -> dict[str, Any]:
    """Gradients, terms, updated weights and the teacher's next output for the global batch of step 0, on all ranks."""
    images, masks = batch(0, 16, parts=accumulate, rank=rank, ranks=size, union=weights.views == "target_blocks")
    optimizer = AdamW(parameter_groups(net), lr=1e-2, averages=net.averages())
    out = forward_backward(net, images, masks, weights)
    grads = {name: full(p.grad).clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step(momentum=0.5)
    return {
        "terms": distributed.mean_over_ranks(torch.stack(out.terms)),
        "grads": grads,
        "weights": {name: full(p.detach()).clone() for name, p in net.named_parameters()},
        "targets": distributed.gather_rows(target_embeddings(net.target_encoder, images)),
        "predictions": distributed.gather_rows(out.predictions),
    }


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for views in ("target_blocks", "context_target"):
        for accumulate in (1, 2):
            net = sharded()
            results[f"{views}-{accumulate}"] = one_step(net, rank, size, WEIGHTS._replace(views=views), accumulate)
            assert all(isinstance(p, DTensor) for p in net.target_encoder.parameters()), "the teacher stays gathered"

    # statistics: every rank's gradient of mean-over-ranks losses against the undivided batch
    z = (torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0)) + 8).chunk(size)[rank].requires_grad_()
    sim, std, cov = block_vicreg(z)
    (sim + 2 * std + 3 * cov).backward()
    results["vicreg"] = [distributed.gather_rows(x) for x in (torch.stack([sim, std, cov])[None], z.grad)]
    sim, std, cov = context_target_vicreg(z[:, 0], z[:, 1].detach())
    results["context_target"] = distributed.gather_rows(torch.stack([sim, std, cov])[None])
    norm = GlobalBatchNorm(6)
    y = (torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 3 + 8).chunk(size)[rank].requires_grad_()
    (norm(y) * torch.sin(torch.arange(96.0)).view(16, 6).chunk(size)[rank]).sum().backward()
    results["norm"] = distributed.gather_rows(y.grad)

    if size == 2:  # a checkpoint of two processes, for one and four
        net = sharded()
        optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-2, fused=True)
        state = checkpoint.training_state(net, optimizer)
        forward_backward(net, *batch(0, 16, rank=rank, ranks=size), WEIGHTS)
        optimizer.step()
        checkpoint.save(Path(folder).parent / "checkpoints", 7, state, keep=2, extra={"a": 1})
        results["state"] = {name: full(tensor).clone() for name, tensor in state.items()}
    if size == 4:
        net = sharded()
        state = checkpoint.training_state(net, torch.optim.AdamW(parameter_groups(net)))
        assert checkpoint.load(Path(folder).parent / "checkpoints", state) == (7, {"a": 1})
        results["state"] = {name: full(tensor).clone() for name, tensor in state.items()}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    root, found = tmp_path_factory.mktemp("ranks"), {}
    for size in (2, 4):
        folder = root / str(size)
        folder.mkdir()
        mp.spawn(worker, (size, str(folder)), nprocs=size)
        found[size] = torch.load(folder / "results.pt")
    found[0] = {"checkpoints": root / "checkpoints"}
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("views", ["target_blocks", "context_target"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_step(results: dict[int, dict[str, Any]], size: int, views: str, accumulate: int) -> None:
    theirs = results[size][f"{views}-{accumulate}"]
    ours = one_step(networks(dtype=torch.float64), 0, 1, WEIGHTS._replace(views=views), 1)
    torch.testing.assert_close(theirs["terms"], ours["terms"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(theirs["predictions"], ours["predictions"], rtol=1e-10, atol=1e-12)
    assert theirs["grads"].keys() == ours["grads"].keys()
    for name, grad in ours["grads"].items():
        error = (theirs["grads"][name] - grad).norm() / grad.norm()
        assert error < 1e-9, f"{name}: gradient differs by {error:.1e}"
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][name], weight, rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(theirs["targets"], ours["targets"], rtol=1e-4, atol=1e-5)
    stale = target_embeddings(networks(dtype=torch.float64).target_encoder, batch(0, 16)[0])
    assert (ours["targets"] - stale).abs().max() > 0.02  # the comparison above would notice a stale teacher


@pytest.mark.parametrize("size", [2, 4])
def test_batch_statistics(results: dict[int, dict[str, Any]], size: int) -> None:
    z = (torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0)) + 8).double().requires_grad_()
    terms = block_vicreg(z)
    (terms[0] + 2 * terms[1] + 3 * terms[2]).backward()
    found, grad = results[size]["vicreg"]
    for row in found:  # every rank holds the global value
        torch.testing.assert_close(row.double(), torch.stack(terms), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double() / size, z.grad, rtol=1e-4, atol=1e-7)  # FSDP2 divides by the size
    truth = torch.stack(context_target_vicreg(z[:, 0], z[:, 1]))
    for row in results[size]["context_target"]:
        torch.testing.assert_close(row.double(), truth, rtol=1e-5, atol=1e-7)
    y = (torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 3 + 8).double().requires_grad_()
    normed = torch.nn.functional.batch_norm(y, None, None, training=True)
    (normed * torch.sin(torch.arange(96.0)).view(16, 6)).sum().backward()
    torch.testing.assert_close(results[size]["norm"].double(), y.grad, rtol=1e-3, atol=1e-6)


def test_checkpoint_of_two_processes_fits_one_and_four(results: dict[int, dict[str, Any]]) -> None:
    net = networks(dtype=torch.float64)
    state = checkpoint.training_state(net, torch.optim.AdamW(parameter_groups(net)))
    assert checkpoint.load(results[0]["checkpoints"], state) == (7, {"a": 1})
    saved = results[2]["state"]
    assert any(name.startswith("optimizer.") and tensor.abs().sum() > 0 for name, tensor in saved.items())
    for loaded in (state, results[4]["state"]):
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor), name
