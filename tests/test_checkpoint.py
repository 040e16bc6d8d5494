"""A checkpoint is whole, checked and exact, or it is not there: faults are named, never loaded, never overwritten."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from cjepa_fast.errors import UserError
from cjepa_fast.run import checkpoint


def state(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.sin(torch.arange(1000.0)) + value, "b.c": torch.full((3, 5), value), "step": torch.tensor(value)}


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(folder, step, state(step), keep=keep, extra={"note": step})


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 12):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000012"]
    target = state(0)
    assert checkpoint.load(tmp_path, target) == (12, {"note": 12})
    for name, tensor in state(12).items():
        assert torch.equal(target[name], tensor), name


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-00000001.bak", "step-x", "step-"):
        (tmp_path / name).mkdir()
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path, state(0))[0] == 2 and len(list(tmp_path.iterdir())) == 4


def test_an_old_checkpoint_that_cannot_go_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert checkpoint.load(tmp_path, state(0))[0] == 2 and "Device or resource busy" in caplog.text


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, state(6), keep=2, extra={})
    target = state(0)
    assert checkpoint.load(tmp_path, target) == (5, {}) and target["step"] == 6


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    for name in files_of(newest):
        folder = tmp_path / f"copy-{name}"
        shutil.copytree(tmp_path / "step-00000001", folder / "step-00000001")
        shutil.copytree(newest, folder / "step-00000002")
        victim = folder / "step-00000002" / name
        content = bytearray(victim.read_bytes())
        if kind == "delete":
            victim.unlink()
        elif kind == "truncate":
            victim.write_bytes(content[: len(content) // 2])
        elif name != checkpoint.MANIFEST:
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        else:
            victim.write_bytes(content.replace(b'"files"', b'"filez"'))
        caplog.clear()
        target = state(0)
        with caplog.at_level(logging.WARNING, "cjepa_fast"):
            assert checkpoint.load(folder, target)[0] == 1, name
        assert target["step"] == 1 and name in caplog.text and "step-00000002" in caplog.text

        shutil.rmtree(folder / "step-00000001")
        with pytest.raises(UserError, match="none of the 1 checkpoints is intact"):
            checkpoint.load(folder, state(0))


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.load(tmp_path, state(0))


def test_a_torn_save_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename: the folder keeps its .partial suffix and is neither loaded nor counted."""
    save(tmp_path, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.os, "replace", crash)
        save(tmp_path, 2)
    assert files_of(tmp_path) == ["step-00000001", "step-00000002.partial"]
    assert checkpoint.load(tmp_path, state(0))[0] == 1
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path, state(0))[0] == 2


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint not written"):
        save(tmp_path / "file", 1)


def test_a_full_disk_is_told_in_a_few_words(tmp_path: Path) -> None:
    """DCP's own error is the tracebacks of all ranks, the last of which is torch.save's, about a file it left open."""
    tensors = {"a": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            checkpoint.save(tmp_path, 1, tensors, keep=2, extra={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).endswith("checkpoint not written; free space or permissions? [Errno 27] File too large")


def test_other_networks_do_not_fit(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for wrong in ({"d": torch.zeros(2)}, {"b.c": torch.zeros(4, 5)}):
        with pytest.raises(UserError, match="does not fit this run's networks"):
            checkpoint.load(tmp_path, wrong)


def test_manifest_says_what_made_it(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 3) / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 3 and manifest["torch"] == torch.__version__ and manifest["processes"] == 1
    assert {".metadata", "__0_0.distcp"} <= set(manifest["files"])


def test_any_optimizer_is_saved_and_restored(tmp_path: Path) -> None:
    """SGD with momentum, whose state has other names than AdamW's."""

    def trained(steps: int, load: bool = False) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        if load:
            checkpoint.init_state(optimizer)
            assert checkpoint.load(tmp_path, checkpoint.training_state(layer, optimizer)) == (2, {})
        for _ in range(steps):
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer, optimizer

    layer, optimizer = trained(2)
    state = checkpoint.training_state(layer, optimizer)
    assert {"optimizer.weight.momentum_buffer", "optimizer.bias.momentum_buffer"} <= state.keys()
    checkpoint.save(tmp_path, 2, state, keep=2, extra={})
    for ours, theirs in zip(trained(3, load=True)[0].parameters(), trained(5)[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
