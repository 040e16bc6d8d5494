"""The manifest: its content, damage to its file, and images that changed since."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bad_images import SOUND, jpeg
from cjepa_fast.errors import UserError
from cjepa_fast.feed.index import cached_manifest, open_sources
from cjepa_fast.feed.manifest import Manifest, ManifestError, SampleError
from cjepa_fast.feed.scan import Mode
from indexing import PAIR, build, tar


def test_a_manifest_says_what_was_found(tmp_path: Path, data: Path):
    for i, (name, height, width) in enumerate((("cat/b", 20, 30), ("cat/a", 30, 20), ("dog/c", 9, 8))):
        (data / name).parent.mkdir(exist_ok=True)
        (data / f"{name}.jpg").write_bytes(jpeg(i, height, width))
    manifest, _ = build(data)
    assert [manifest.name(i) for i in range(3)] == [str(data / f"{n}.jpg") for n in ("cat/a", "cat/b", "dog/c")]
    assert manifest.sizes.tolist() == [[30, 20], [20, 30], [9, 8]] and manifest.sizes.dtype == np.int32
    assert manifest.classes == ("cat", "dog") and manifest.labels is not None
    assert manifest.labels.tolist() == [0, 0, 1] and manifest.labels.dtype == np.int64
    manifest.save(tmp_path / "m")
    again = Manifest.load(tmp_path / "m")
    assert again.entries.tolist() == manifest.entries.tolist() and again.meta == manifest.meta
    assert list(again.names) == list(manifest.names) and list(again.containers) == ["cat", "dog"]


def test_what_is_left_out_shifts_neither_places_nor_labels(data: Path):
    for name, content in (("a/1", b""), ("b/1", b"x"), ("b/2", SOUND), ("c/1", b""), ("d/1", jpeg(5))):
        (data / name).parent.mkdir(exist_ok=True)
        (data / f"{name}.jpg").write_bytes(content)
    manifest, rejected = build(data)
    assert [manifest.name(i) for i in range(2)] == [str(data / "b" / "2.jpg"), str(data / "d" / "1.jpg")]
    assert list(manifest.containers) == ["b", "d"] and manifest.classes == ("a", "b", "c", "d")
    assert manifest.labels is not None and manifest.labels.tolist() == [1, 3]
    assert [r.file for r in rejected] == [str(data / f"{name}.jpg") for name in ("a/1", "b/1", "c/1")]


def test_a_new_manifest_leaves_those_who_use_the_old_one(tmp_path: Path, data: Path):
    (data / "a.jpg").write_bytes(SOUND)
    build(data)[0].save(tmp_path / "m")
    old = Manifest.load(tmp_path / "m")
    (data / "0.jpg").write_bytes(SOUND)
    build(data)[0].save(tmp_path / "m")
    assert old.names[0] == "a.jpg" and Manifest.load(tmp_path / "m").names[0] == "0.jpg"


@pytest.mark.parametrize("mode", ["quick", "thorough"])
def test_a_sample_that_changed_is_noticed(data: Path, mode: Mode):
    file = data / "a.jpg"
    other = jpeg(9, 20, 30)
    flipped = SOUND[:-50] + bytes([SOUND[-50] ^ 1]) + SOUND[-49:]
    for content, says in (
        (other, "changed since it was indexed; restore it or index again"),
        (SOUND + b"x", "changed since"),
        (b"", "changed since"),
        (None, "cannot be read any more (No such file or directory); restore it or index again"),
    ):
        file.write_bytes(SOUND)
        manifest, _ = build(data, mode)
        assert manifest.read(0) == SOUND and manifest.fault(0) is None
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SampleError) as caught:
            manifest.read(0)
        assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value) and caught.value.sample == 0
        assert manifest.fault(0) == str(caught.value)
    file.write_bytes(flipped)
    assert manifest.read(0) == flipped
    if mode == "thorough":
        with pytest.raises(SampleError, match="changed since"):
            manifest.read(0, verify=True)
        assert manifest.fault(0) is not None


def test_reading_shards_keeps_few_files_open(data: Path):
    contents = [jpeg(i, 20 + i % 9, 30) for i in range(100)]
    for i, content in enumerate(contents):
        (data / f"s{i:03d}.tar").write_bytes(tar((f"{i}.jpg", content)))
    manifest, _ = build(data)
    gc.collect()  # else files that earlier tests left to the collector may be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 100, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: manifest.read(i, verify=True) == contents[i], order))
    assert before + 50 <= len(os.listdir("/proc/self/fd")) <= before + 70
    manifest.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_reads_too(data: Path):
    (data / "s.tar").write_bytes(tar(*PAIR))
    manifest, _ = build(data)
    assert manifest.read(0) == SOUND
    if (child := os.fork()) == 0:
        os._exit(0 if all(manifest.read(i) == SOUND for i in (1, 0, 1)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b[:-1], "is damaged"),
        (lambda b: b[:60], "is damaged"),
        (lambda b: b[:20], "is damaged"),
        (lambda b: b"", "is not a manifest"),
        (lambda b: b"CJEPA manifest 9" + b[16:], "is not a manifest"),
        (lambda b: b"\x80\x04cos\nsystem\n", "is not a manifest"),
        (lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:], "is damaged"),
        (lambda b: b[:-70] + bytes([b[-70] ^ 1]) + b[-69:], "is damaged"),
        (lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:], "is damaged"),
    ],
)
def test_a_damaged_manifest_is_written_anew(
    data: Path, damage: Callable[[bytes], bytes], says: str, caplog: pytest.LogCaptureFixture
):
    root = str(data)
    (data / "a.jpg").write_bytes(SOUND)
    open_sources([root])
    file = cached_manifest(root, mode="quick", max_pixels=178_956_970)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    with pytest.raises(ManifestError, match=says):
        Manifest.load(file)
    caplog.clear()
    assert len(open_sources([root])) == 1 and file.read_bytes() == sound
    assert caplog.messages[0] == f"indexing {root}: the index file {says}"
    caplog.clear()
    assert len(open_sources([root])) == 1 and caplog.messages == []


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.jpg").write_bytes(SOUND)
    found, _ = build(data)
    found.save(tmp_path / "m")
    sound = (tmp_path / "m").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"m: cannot be written \(No space left on device\)"):
        found.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == sound
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "m"]
