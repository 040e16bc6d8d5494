"""The main job on every kind of source, on mixtures, and on images that cannot be read."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cjepa_fast.feed.order import epoch_order
from cjepa_fast.train import main
from runs import SMALL, metrics, run, tensors, torchrun, without_clocks

TWO_STEPS = ("--optim.steps", "2", "--optim.warmup-epochs", "0")


def as_tar(images: Path, folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as shard:
        for i, path in enumerate(sorted(images.glob("*/*.jpg"))):
            shard.add(path, f"{i:03d}.jpg")
            label = tarfile.TarInfo(f"{i:03d}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"0" if path.parent.name == "cat" else b"1"))
    return folder


def as_flat_folder(images: Path, folder: Path) -> list[str]:
    folder.mkdir()
    for i, path in enumerate(sorted(images.glob("*/*.jpg"))):
        shutil.copy(path, folder / f"{i:03d}.jpg")
    return [str(folder)]


def as_parquet(images: Path, folder: Path) -> list[str]:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet is not tested")
    paths = sorted(images.glob("*/*.jpg"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [int(path.parent.name == "dog") for path in paths],
    }
    folder.mkdir()
    importlib.import_module("pyarrow.parquet").write_table(
        pyarrow.table(rows), folder / "train-0.parquet", row_group_size=7
    )
    return [str(folder / "train-*.parquet")]


def as_list(images: Path, folder: Path, ending: str) -> list[str]:
    """With labels, of paths relative to it."""
    folder.mkdir()
    lines = ["path,label"] if ending == "csv" else []
    for path in sorted(images.glob("*/*.jpg")):
        relative = os.path.relpath(path, folder)
        lines.append(f"{relative},{path.parent.name}" if ending == "csv" else f"{relative}\t{path.parent.name}")
    (folder / f"train.{ending}").write_text("\n".join(lines) + "\n")
    return [str(folder / f"train.{ending}")]


KINDS = {
    "flat folder": (as_flat_folder, "40 images in 1 folder, no labels"),
    "tar shards": (lambda images, folder: [str(as_tar(images, folder))], "40 images in 1 tar shard, 2 labels"),
    "parquet": (as_parquet, "40 images in 1 parquet file, 2 labels"),
    "text list": (functools.partial(as_list, ending="txt"), "40 images in a list of 40 paths, 2 labels"),
    "CSV list": (functools.partial(as_list, ending="csv"), "40 images in a list of 40 paths, 2 labels"),
    "mixture": (
        lambda images, _: [f"{images / 'cat'}=1", f"{images / 'dog'}=1"],
        "20 images in 1 folder, no labels, weight 1; 20 images in 1 folder, no labels, weight 1",
    ),
}


@pytest.fixture(scope="module")
def two_steps(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return without_clocks(run(images, tmp_path_factory.mktemp("runs") / "two", *TWO_STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_trains_as_class_folders_do(
    images: Path, two_steps: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same images in the same order: every figure of every step is equal, and so is the probe's, given labels."""
    lay_out, found = KINDS[kind]
    roots = lay_out(images, tmp_path / "data")
    assert main([*SMALL, "--run.dir", str(tmp_path / "run"), *TWO_STEPS, "--data.root", *roots]) == 0
    printed = capsys.readouterr().out
    assert f"data: {' '.join(roots)}: {found}\n" in printed
    expected = two_steps
    if "no labels" in found:
        assert "no labels, so no 20-NN probe" in printed
        expected = [{name: x for name, x in line.items() if name != "knn_top1"} for line in two_steps]
    assert without_clocks(metrics(tmp_path / "run")) == expected


def test_roots_are_mixed_and_resume_knows_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = as_tar(images, tmp_path / "shards"), tmp_path / "run"
    roots = [f"{shards}=2", f"{images / 'cat'}=0.5"]  # 80 and 10 visits: 11 steps of 8 an epoch
    arguments = [*SMALL, "--run.dir", str(out), "--optim.steps", "14", "--data.root", *roots]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "weight 2; 20 images in 1 folder, no labels, weight 0.5" in printed
    assert "11 steps an epoch (2 of its 90 images left over, others each time), 14 steps in all" in printed
    assert "no labels, so no 20-NN probe" in printed
    lines = without_clocks(metrics(out))

    shutil.rmtree(out / "checkpoints" / "step-00000014")
    assert main(["--resume", str(out), "--data.root", roots[0], f"{images / 'cat'}=0.6"]) == 2
    assert "the run began with other weights or images; restore them" in capsys.readouterr().err
    assert main(["--resume", str(out), "--data.root", f"{images}=2", roots[1]]) == 2
    assert f"{images}: is a folder, the run began with a tar" in capsys.readouterr().err
    kept = (out / "index" / "1").read_bytes()
    (out / "index" / "1").write_bytes(kept[:-9])
    assert main(["--resume", str(out)]) == 2
    assert (
        f"{out / 'index' / '1'}: the run's index of {images / 'cat'} is damaged; restore it" in capsys.readouterr().err
    )
    (out / "index" / "1").write_bytes(kept)
    shards.rename(tmp_path / "moved")
    assert main(["--resume", str(out), "--data.root", f"{tmp_path / 'moved'}=2", roots[1]]) == 0
    assert without_clocks(metrics(out)) == lines


def spoil(image: Path) -> None:
    """In place and of the same length, so that no index notices."""
    image.write_bytes(b"<html>" + image.read_bytes()[6:])


def test_a_bad_image_ends_the_run_or_is_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flat, out = tmp_path / "flat", tmp_path / "run"
    shutil.copytree(images / "cat", flat)
    arguments = [*SMALL, "--data.root", str(flat), "--run.checkpoint-every", "3"]
    assert main([*arguments, "--check"]) == 0
    victim = flat / "7.jpg"
    spoil(victim)
    assert main([*arguments, "--run.dir", str(tmp_path / "strict")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {victim}: starts with b'<html>JF'") and error.count("\n") == 1
    assert "data.on_error skip" in error

    caplog.clear()
    lines = run(flat, out, *arguments[-2:], "--data.on-error", "skip")
    assert f"skipped from now on: {victim}" in caplog.text
    assert [line["skipped_images"] for line in lines][-9:] == [1] * 9  # met within the first epoch, of 2 steps
    assert json.loads((out / "run_state.json").read_text())["skipped_images"] == 1
    ours = tensors(out / "checkpoints" / "step-00000012", tmp_path / "a.pt")
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    victim.unlink()  # which changes the folder: the run goes on with its own index
    caplog.clear()
    assert main(["--resume", str(out)]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # it is not met again
    assert without_clocks(metrics(out)) == without_clocks(lines)
    again = tensors(out / "checkpoints" / "step-00000012", tmp_path / "b.pt")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_processes_skip_the_same_images(images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    more = ["--data.root", str(data), "--data.on-error", "skip"]
    assert main([*SMALL, *more, "--check"]) == 0
    spoil(sorted(data.glob("*/*.jpg"))[epoch_order(40, seed=0, epoch=0)[13]])  # in step 1, and the second rank's
    alone = run(data, tmp_path / "alone", *more)
    done = torchrun(2, *SMALL, *more, "--run.dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    together = metrics(tmp_path / "two")
    for a, b in zip(alone, together, strict=True):
        assert a["skipped_images"] == b["skipped_images"] == (a["step"] > 1)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert together[-1]["knn_top1"] == alone[-1]["knn_top1"]
