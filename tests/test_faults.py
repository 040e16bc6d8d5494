"""Images and storage that turn bad while a run reads them: messages, skips, waits and errors."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import tensors

from bad_images import png_chunk, png_header
from cjepa_fast.errors import UserError
from cjepa_fast.feed import bad as bad_images
from cjepa_fast.feed import batches as feed
from cjepa_fast.feed import manifest, read
from cjepa_fast.feed.bad import BadImages
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import batch_ids, epoch_order
from pictures import assert_same, batches, center, fifty, images_by_step, opened, over_ranks, packed, picture

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def source(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return fifty(tmp_path_factory.mktemp("images"))


def _html(path: Path) -> None:
    """Overwrite the start, at the same length, so that only the bytes show the change."""
    path.write_bytes(b"<html>" + path.read_bytes()[6:])


def _png_of_noise(path: Path) -> None:
    """Write a PNG of right checksums around bytes that are no compressed data."""
    path.write_bytes(png_header(64, 64) + png_chunk(b"IDAT", bytes(range(200))) + png_chunk(b"IEND", b""))


def twelve(root: Path, *, epoch_position: int, prepare=None) -> tuple[Mixture, Path]:
    """Return twelve images and the file at a position of epoch 0, which `prepare` changes before indexing."""
    for i in range(12):
        picture(i, 64, 64).save(root / f"{i:02d}.jpg")
    victim = root / f"{epoch_order(12, seed=3, epoch=0)[epoch_position]:02d}.jpg"
    if prepare is not None:
        prepare(victim)
    return opened(root), victim


@pytest.mark.parametrize(
    ("before", "damage", "says"),
    [
        (None, lambda path: path.write_bytes(path.read_bytes()[:-80]), "changed since it was indexed"),
        (None, lambda path: path.write_bytes(b""), "changed since it was indexed"),
        (None, lambda path: picture(0, 4, 4).save(path), "changed since it was indexed"),
        (None, Path.unlink, r"cannot be read any more \(No such file or directory\)"),
        (None, _html, "starts with b'<html>"),
        (_png_of_noise, None, "DALI cannot decode it"),
    ],
)
def test_a_bad_image_is_named(tmp_path: Path, before, damage, says: str):
    source, victim = twelve(tmp_path, epoch_position=9, prepare=before)  # in step 2 of batches of four
    if damage is not None:
        damage(victim)
    loader = batches(source, batch_size=4, crop_scale=(1.0, 1.0), hflip=False)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(UserError, match=says) as caught:
        next(loader)
    assert str(caught.value).startswith(f"{victim}:") and "\n" not in str(caught.value)


def test_a_bad_member_of_a_shard_is_named(source: Mixture, tmp_path: Path):
    shards = opened(packed(source, tmp_path, "tar"))
    victim = int(epoch_order(50, seed=3, epoch=0)[20])
    with open(shards.path(victim), "r+b") as shard:
        shard.seek(int(shards.name(victim).rpartition(" ")[2].replace(",", "")))
        shard.write(b"<html>")
    loader = batches(shards)
    next(loader)
    with pytest.raises(UserError, match=rf"train-{victim // 30 * 30:02d}.tar: {victim:03d}.jpg at byte .*starts with"):
        next(loader)


def test_a_bad_image_is_skipped_wherever_it_is_met(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source, victim = twelve(tmp_path, epoch_position=9)
    sound = images_by_step(source, batch_size=4, last_step=9)
    _html(victim)
    options = {"batch_size": 4, "last_step": 9}  # three epochs of three steps
    bad = BadImages(source, "skip")
    met = images_by_step(source, bad=bad, **options)
    (i,) = bad.ids
    assert source.path(i) == str(victim)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"skipped from now on: {victim}: starts with b'<html>JF', not as a JPEG, PNG, WebP, BMP, PNM or TIFF does"
    ]
    order = epoch_order(12, seed=3, epoch=0)
    for step, (ids, images) in met.items():
        for k, (before, now) in enumerate(zip(sound[step][0], ids, strict=True)):
            assert now == (order[(9 + 6) % 12] if step == 2 and before == i else now) and now != i
            assert before == i or (now == before and torch.equal(images[k], sound[step][1][k]))
    caplog.clear()
    assert_same(met, images_by_step(source, bad=BadImages(source, "skip", [i]), **options))
    assert_same(met, over_ranks(source, 2, bad=BadImages(source, "skip", [i]), threads=2, **options))
    late = images_by_step(source, bad=BadImages(source, "skip", [i]), first_step=2, prefetch=1, **options)
    assert_same({step: met[step] for step in late}, late)
    assert not caplog.records
    ranks = [BadImages(source, "skip") for _ in range(2)]  # each finds out for itself
    parts = [images_by_step(source, rank=r, world_size=2, bad=ranks[r], **options) for r in range(2)]
    assert_same(met, {s: (parts[0][s][0] + parts[1][s][0], torch.cat([p[s][1] for p in parts])) for s in met})


@pytest.mark.parametrize("damage", [_html, Path.unlink])
def test_dali_is_given_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage):
    """DALI 2.4 may crash the process over other bytes: in about one of three such runs on four threads."""
    source, victim = twelve(tmp_path, epoch_position=9)
    damage(victim)
    given: list[bytes] = []
    make = tensors.TensorCPU
    monkeypatch.setattr(tensors, "TensorCPU", lambda encoded: (given.append(encoded), make(encoded))[1])
    bad = BadImages(source, "skip")
    assert len(images_by_step(source, bad=bad, batch_size=4, last_step=9)) == 9 and len(bad.ids) == 1
    assert len(given) >= 36 and all(encoded.startswith(b"\xff\xd8") for encoded in given)


def test_the_stand_in_of_a_bad_image_is_sound_and_drawn_anew(source: Mixture):
    order = epoch_order(50, seed=3, epoch=1)
    bad = {int(order[20]), int(order[45]), int(order[46])}  # 45 and 46 stand in for 20, and for 21 if it were bad
    epoch, ids, repeats = batch_ids(source, seed=3, step=4, batch_size=16, skipped=bad)
    assert epoch == 1 and ids.tolist() == [*order[16:20], order[47], *order[21:32]]
    assert repeats[4] > 2**20 and not np.delete(repeats, 4).any()
    with pytest.raises(UserError, match="none of the images is left"):
        batch_ids(source, seed=3, step=0, batch_size=16, skipped=range(50))


def test_too_many_bad_images_stop_the_run(tmp_path: Path):
    source, victim = twelve(tmp_path, epoch_position=9)
    other = Path(source.path(int(epoch_order(12, seed=3, epoch=0)[6])))
    for path in (victim, other):
        _html(path)
    loader = batches(source, batch_size=4, bad=BadImages(source, "skip"))
    with pytest.raises(UserError, match=rf"2 of 12 images turned bad, over the limit of 0.1 %, such as {tmp_path}"):
        list(loader)
    bad = BadImages(opened(tmp_path), "skip")
    bad._source = range(5000)  # type: ignore[assignment]
    bad.add(range(5))


def test_the_probe_shows_another_image_of_the_label(source: Mixture):
    assert source.labels is not None
    alike = np.flatnonzero(source.labels == source.labels[7])
    after = int(alike[list(alike).index(7) + 1])
    (views,) = center(source, np.array([7, 1]), 24, 2, BadImages(source, "skip", [7]))
    (other,) = center(source, np.array([after, 1]), 24, 2)
    assert torch.equal(views, other)
    last = int(alike[-1])
    assert feed._with_its_label(source, last, {last, int(alike[0])}) == alike[1]


def test_storage_that_is_gone_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No image is bad then, so the policy does not matter."""
    (tmp_path / "data").mkdir()
    source, _ = twelve(tmp_path / "data", epoch_position=0)
    sound = images_by_step(source, batch_size=4)
    slept = []

    def mount_again(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (tmp_path / "gone").rename(tmp_path / "data")

    monkeypatch.setattr(bad_images.time, "sleep", mount_again)
    bad = BadImages(source, "skip")
    loader = batches(source, batch_size=4, bad=bad, prefetch=1)
    found = {}
    for batch in loader:
        found[batch.step] = (batch.ids.tolist(), batch.images)
        if batch.step == 1:
            (tmp_path / "data").rename(tmp_path / "gone")
    assert_same(sound, found)
    assert slept == [1.0, 5.0] and not bad.ids
    (tmp_path / "data").rename(tmp_path / "far")
    with pytest.raises(UserError, match=r"/data/.*No image of its batch can be read: is the storage gone\? Go on with"):
        list(batches(source, batch_size=4, bad=bad))
    assert slept[2:] == [1.0, 5.0, 30.0] and not bad.ids


@pytest.mark.parametrize("back", ["after a pause", "at once"])
def test_storage_that_goes_while_a_batch_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str):
    """Images that did not come are not bad, even if other images of their batch came."""
    (tmp_path / "data").mkdir()
    source, _ = twelve(tmp_path / "data", epoch_position=0)
    sound = images_by_step(source, batch_size=4)
    read_many, sizes = source.read_many, []

    def move(there: str, here: str) -> None:
        (tmp_path / there).rename(tmp_path / here)

    def read(ids: np.ndarray) -> list:
        found = read_many(ids)
        sizes.append(len(ids))
        if len(sizes) == 3:  # a batch is read in two parts: the first of the second batch came
            move("data", "gone")
        if len(sizes) == 4 and back == "at once":
            move("gone", "data")
        return found

    monkeypatch.setattr(source, "read_many", read)
    monkeypatch.setattr(bad_images.time, "sleep", lambda seconds: move("gone", "data"))
    bad = BadImages(source, "skip")
    assert_same(sound, images_by_step(source, batch_size=4, bad=bad))
    assert not bad.ids and sizes[:4] == [2, 2, 2, 2] and (tmp_path / "data").exists()


def test_storage_errors_that_pass_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    source, victim = twelve(tmp_path, epoch_position=9)
    sound = images_by_step(source, batch_size=4)
    failures = 0
    slept = []
    read_file = manifest.read_file

    def stutter(path: str, limit: int) -> bytes:
        nonlocal failures
        if path == str(victim) and failures > 0:
            failures -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_file(path, limit)

    monkeypatch.setattr(manifest, "read_file", stutter)
    monkeypatch.setattr(manifest.time, "sleep", slept.append)
    failures = 3
    assert_same(sound, images_by_step(source, batch_size=4))
    assert slept == [0.1, 1.0, 5.0]
    assert f"{victim}: Stale file handle; trying again in 0.1 s" in caplog.text
    failures = 10**6
    with pytest.raises(UserError, match=r"cannot be read any more \(Stale file handle\)"):
        list(batches(source, batch_size=4))
    tried = len(slept)
    with pytest.raises(UserError, match="Stale file handle"):  # no patience for the next one
        source.read(int(epoch_order(12, seed=3, epoch=0)[9]))
    assert tried == len(slept) == 6


def test_a_read_that_hangs_is_told_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    source, victim = twelve(tmp_path, epoch_position=9)
    back = threading.Event()
    read_file = manifest.read_file

    def hang(path: str, limit: int) -> bytes:
        if path == str(victim):
            back.wait(20)
        return read_file(path, limit)

    monkeypatch.setattr(manifest, "read_file", hang)
    monkeypatch.setattr(read, "ALARM_S", 0.05)
    monkeypatch.setattr(read, "PATIENCE", 3)
    loader = batches(source, batch_size=4, prefetch=1)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(UserError, match=rf"no image for 0.15 s, reading {tmp_path}/.*: go on with --resume when"):
        next(loader)
    back.set()
    assert "no image for 0.1 s" in caplog.text
    monkeypatch.setattr(read, "PATIENCE", 1000)
    back.clear()
    threading.Timer(0.3, back.set).start()
    waits = {batch.step: batch.wait_ms for batch in batches(source, batch_size=4, prefetch=1)}
    assert waits[2] > 100 > min(waits.values())  # a slow disk shows in data_wait_ms
