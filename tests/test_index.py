"""The index: an exact outcome for every kind of root, renewal, several roots, and the command."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bad_images import CASES, SOUND, jpeg, tree
from cjepa_fast.errors import UserError
from cjepa_fast.feed import index, scan
from cjepa_fast.feed.images import FORMATS, REASONS
from cjepa_fast.feed.index import cached_manifest, open_sources
from cjepa_fast.feed.listing import Rejected
from cjepa_fast.feed.manifest import SampleError
from cjepa_fast.feed.order import epoch_visits
from cjepa_fast.feed.sources import find_source
from cjepa_fast.index import main
from indexing import PAIR, build, tar

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache beside `tmp_path / "data"`."""
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "cache"


def sparse_tar() -> bytes:
    """Return a tar with a GNU sparse member, which holds less than its size says."""
    header = bytearray(tar(("a.jpg", SOUND))[:512])
    header[156:157] = b"S"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(2048)


@dataclasses.dataclass(frozen=True)
class Root:
    """Files below data/, the root given, and the outcome: a description and the files left out, or a message."""

    files: dict[str | bytes, bytes]
    outcome: str
    left_out: tuple[tuple[str, str, str], ...] = ()  # (member or file name, reason, a part of the detail)
    root: str = ""
    prepare: Callable[[Path], object] = lambda data: None


def page(lines: str) -> bytes:
    return lines.encode()


ROOTS = {
    # folders
    "class folders": Root({"cat/1.jpg": SOUND, "dog/2.jpg": SOUND}, "2 images in 2 class folders"),
    "nested folders": Root({"x/cat/1.jpg": SOUND, "x/dog/2.jpg": SOUND}, "2 images in 2 folders, no labels"),
    "flat folder": Root({"1.jpg": SOUND, "note.md": b""}, "1 image in 1 folder, no labels; 1 other file ignored"),
    "folder of one class": Root({"cat/1.jpg": SOUND}, "1 image in 1 folder, no labels"),
    "a class of nothing but bad files": Root(
        {"cat/1.jpg": SOUND, "dog/2.jpg": b""}, "1 image in 2 class folders; 1 left out (1 empty)",
        (("2.jpg", "empty", "0 bytes"),),
    ),
    "empty folder": Root({}, "error: {root}: holds no images but 0 other files; give a folder with .jpg"),
    "folders without images": Root(
        {"a/x.md": b"", "b/c/y.md": b""}, "error: {root}: holds no images but 2 other files; give a folder with .jpg"
    ),
    "nothing but bad images": Root(
        {"a.jpg": b"", "b.jpg": b"x"},
        "error: {root}: holds no usable image: {data}/a.jpg: 0 bytes, and 1 more; remove or replace what is bad",
    ),
    "no folder at all": Root({}, "error: {root}: no such file or folder; give the folder", root="nowhere"),
    "an image as root": Root({"a.jpg": SOUND}, "error: {root}: is a single image; give a folder, .tar", root="a.jpg"),
    "some file as root": Root({"a.bin": b"x"}, "error: {root}: is a file; give a folder, .tar", root="a.bin"),
    "packed": Root({"a.tar.gz": b"x"}, "error: {root}: is packed; unpack it once", root="a.tar.gz"),
    "a pipe as root": Root({}, "error: {root}: is neither a file nor a folder", root="p",
                           prepare=lambda data: os.mkfifo(data / "p")),
    "an address": Root({}, "error: s3://bucket/x: only local paths are read; copy or mount it", root="s3://bucket/x"),
    "hidden files": Root({"._a.jpg": b"x", ".b/c.jpg": b"x", "a.jpg": SOUND},
                         "1 image in 1 folder, no labels; 1 other file ignored"),
    "pipe": Root({"a.jpg": SOUND}, "1 image in 1 folder, no labels; 1 left out (1 not a file)",
                 (("pipe.jpg", "not a file", "not a regular file"),),
                 prepare=lambda data: os.mkfifo(data / "pipe.jpg")),
    "device": Root({"a.jpg": SOUND}, "1 image in 1 folder, no labels; 1 left out (1 not a file)",
                   (("zero.jpg", "not a file", "not a regular file"),),
                   prepare=lambda data: (data / "zero.jpg").symlink_to("/dev/zero")),
    "dangling link": Root({"a.jpg": SOUND}, "1 image in 1 folder, no labels; 1 left out (1 missing)",
                          (("link.jpg", "missing", "no such file"),),
                          prepare=lambda data: (data / "link.jpg").symlink_to("gone.jpg")),
    "links in a circle": Root({"a.jpg": SOUND}, "1 image in 1 folder, no labels; 1 left out (1 unreadable)",
                              (("x.jpg", "unreadable", "Too many levels of symbolic links"),),
                              prepare=lambda data: (data / "x.jpg").symlink_to("x.jpg")),
    "folder that holds itself": Root({"a/1.jpg": SOUND}, "1 image in 1 folder, no labels",
                                     prepare=lambda data: (data / "a" / "again").symlink_to("..")),
    "folder named .jpg": Root({"a.jpg/1.jpg": SOUND}, "1 image in 1 folder, no labels"),
    "names that are no text": Root({b"\xff\xfe.jpg": SOUND, "a\nb.jpg": b""},
                                   "1 image in 1 folder, no labels; 1 left out (1 empty)",
                                   (("a\nb.jpg", "empty", "0 bytes"),)),
    "very long names": Root({"x" * 200 + "/" + "y" * 251 + ".jpg": SOUND}, "1 image in 1 folder, no labels"),
    "images and shards": Root(
        {"a.jpg": SOUND, "b.tar": tar(*PAIR)},
        "error: {root}: holds 1 images and 1 .tar files; say which, as in folder:{root}",
    ),
    "images and shards, told which": Root(
        {"a.jpg": SOUND, "b.tar": tar(*PAIR)}, "2 images in 1 tar shard, no labels; 1 other file ignored", root="tar:"
    ),
    # tar
    "tar": Root({"a.tar": tar(*PAIR)}, "2 images in 1 tar shard, no labels", root="a.tar"),
    "tar, labels in .cls": Root({"s.tar": tar(*PAIR, ("a.cls", b"3\n"), ("b.cls", b"7"))},
                                "2 images in 1 tar shard, 2 labels"),
    "tar, labels in .json": Root({"s.tar": tar(*PAIR, ("a.json", b'{"label": 3}'), ("b.json", b'{"label": 3}'))},
                                 "2 images in 1 tar shard, 1 label"),
    "tar, a label missing": Root({"s.tar": tar(*PAIR, ("a.cls", b"3\n"))},
                                 "2 images in 1 tar shard, labels not used as 1 of them lack one"),
    "tar, labels that are none": Root(
        {"s.tar": tar(*PAIR, ("a.cls", b"cat"), ("b.json", b"[" * 100_000), ("b.cls", b""))},
        "2 images in 1 tar shard, no labels",
    ),
    "tar with pickles": Root({"s.tar": tar(*PAIR, ("a.pyd", b"cos\nsystem\n."), ("b.pkl", b"."))},
                             "2 images in 1 tar shard, no labels; 2 other files ignored"),
    "tar that points outside": Root(
        {"s.tar": tar(("/etc/a.jpg", SOUND), ("../../b.jpg", SOUND))}, "2 images in 1 tar shard, no labels"
    ),
    "tar with an entry twice": Root({"s.tar": tar(*PAIR, ("a.jpg", SOUND))},
                                    "2 images in 1 tar shard, no labels; 1 left out (1 duplicate)",
                                    (("a.jpg", "duplicate", "a second member of this name, at byte"),)),
    "tar with a sample without image": Root({"s.tar": tar(*PAIR, ("c.cls", b"1"))},
                                            "2 images in 1 tar shard, no labels; 1 left out (1 no image)",
                                            (("c", "no image", "member of this name"),)),
    "tar with bad images": Root({"s.tar": tar(*PAIR, ("c.jpg", b""), ("d.jpg", SOUND[:-9]))},
                                "2 images in 1 tar shard, no labels; 2 left out (1 empty, 1 truncated)",
                                (("c.jpg", "empty", "0 bytes"), ("d.jpg", "truncated", "before its end mark"))),
    "tar cut inside a member": Root({"s.tar": tar(*PAIR)[: 512 + 1024 + 600]},
                                    "1 image in 1 tar shard, no labels; 1 left out (1 bad shard)",
                                    (("", "bad shard", "ends at byte 2,136, inside a member"),)),
    "tar cut between members": Root({"s.tar": tar(*PAIR)[:-10240] + tar(*PAIR)[:1536]},
                                    "1 image in 1 tar shard, no labels; 1 left out (1 bad shard)",
                                    (("", "bad shard", "ends at byte 1,536, before its end mark"),)),
    "tar damaged in the middle": Root({"s.tar": tar(*PAIR)[:1536] + b"x" * 4096},
                                      "1 image in 1 tar shard, no labels; 1 left out (1 bad shard)",
                                      (("", "bad shard", "damaged at byte 1,536"),)),
    "tar beside a broken one": Root({"a.tar": tar(*PAIR), "b.tar": b"\x01random" * 999},
                                    "2 images in 2 tar shards, no labels; 1 left out (1 bad shard)",
                                    (("", "bad shard", "is not a tar"),)),
    "random bytes named .tar": Root({"s.tar": b"\x01random" * 999},
                                    "error: {root}: holds no usable image: {data}/s.tar: is not a tar; remove"),
    "tar of no bytes": Root({"s.tar": b""}, "error: {root}: holds no usable image: {data}/s.tar: is empty (0 bytes);"),
    "compressed tar": Root({"s.tar": b"\x1f\x8b" + bytes(600)},
                           "error: {root}: holds no usable image: {data}/s.tar: is compressed; decompress it;"),
    "tar of nothing": Root({"s.tar": tar()}, "error: {root}: holds no image; give a folder, shards or a list that"),
    "tar of zeros": Root({"s.tar": bytes(10**5 + 1)},
                         "error: {root}: holds no usable image: {data}/s.tar: is not a tar"),
    "sparse tar": Root({"s.tar": sparse_tar()},
                       "error: {root}: holds no usable image: {data}/s.tar: holds sparse members"),
    "tar named .tar, a pipe": Root({"a.tar": tar(*PAIR)},
                                   "2 images in 2 tar shards, no labels; 1 left out (1 bad shard)",
                                   (("", "bad shard", "not a regular file"),),
                                   prepare=lambda data: os.mkfifo(data / "p.tar")),
    "tar with long names": Root({"s.tar": tar(("x" * 3000 + ".jpg", SOUND), ("é" * 90 + ".jpg", SOUND),
                                              form=tarfile.PAX_FORMAT)}, "2 images in 1 tar shard, no labels"),
    "shards of two splits": Root(
        {"train-0.tar": tar(*PAIR), "val-0.tar": tar(*PAIR)},
        "error: {root}: holds shards of train and val; name one, as in {root}/train-*.tar",
    ),
    "pattern": Root({f"train-{i:03d}.tar": tar((f"{i}.jpg", SOUND)) for i in (9, 10, 11)} | {"val-000.tar": tar(*PAIR)},
                    "2 images in 2 tar shards, no labels", root="train-{010..011}.tar"),
    "pattern with a hole": Root(
        {"s-0.tar": tar(*PAIR), "s-2.tar": tar(*PAIR)},
        "error: {data}/s-1.tar: no such file; 1 of the 3 files that {root} stands for are missing", root="s-{0..2}.tar",
    ),
    "pattern of nothing": Root({}, "error: {root}: no file matches; check the pattern", root="*.tar"),
    "pattern of images": Root({"a.jpg": SOUND}, "error: {root}: a pattern stands for .tar files or for", root="*.jpg"),
    # lists
    "list": Root({"l.txt": b"a.jpg\nx/b.jpg\n", "a.jpg": SOUND, "x/b.jpg": SOUND},
                 "2 images in a list of 2 paths, no labels", root="l.txt"),
    "list with comments, blanks and repeats": Root(
        {"l.txt": b"\xef\xbb\xbf# images\r\n\r\na.jpg\r\n./a.jpg\r\n  \r\n", "a.jpg": SOUND},
        "1 image in a list of 2 paths, no labels; 1 left out (1 duplicate)",
        (("line 4", "duplicate", "./a.jpg is listed before"),), root="l.txt",
    ),
    "list with missing files": Root(
        {"l.txt": b"a.jpg\nb.jpg\nx/\n", "a.jpg": SOUND},
        "1 image in a list of 3 paths, no labels; 2 left out (2 missing)",
        (("line 3", "missing", "names no file"), ("b.jpg", "missing", "no such file")), root="l.txt",
    ),
    "list with labels": Root({"l.txt": b"a b.jpg 3\nc.jpg 5\n", "a b.jpg": SOUND, "c.jpg": SOUND},
                             "2 images in a list of 2 paths, 2 labels", root="l.txt"),
    "csv with labels": Root({"l.csv": b'label,path\ncat,"a,b.jpg"\ndog,c.jpg\n', "a,b.jpg": SOUND, "c.jpg": SOUND},
                            "2 images in a list of 2 paths, 2 labels", root="l.csv"),
    "csv without header": Root({"l.csv": b"a.jpg,1\nc.jpg,1\n", "a.jpg": SOUND, "c.jpg": SOUND},
                               "2 images in a list of 2 paths, 1 label", root="l.csv"),
    "csv that is none": Root({"l.csv": b'"a.jpg\n' * 3}, "error: {root}: is not a CSV file", root="l.csv"),
    "list of names that are no text": Root({"l.txt": b"\xff.jpg\n", b"\xff.jpg": SOUND},
                                           "1 image in a list of 1 path, no labels", root="l.txt"),
    "empty list": Root({"l.txt": b"\n# nothing\n"}, "error: {root}: names no image; write one path per line",
                       root="l.txt"),
    "binary list": Root({"l.txt": b"a\0b\n"}, "error: {root}:1: holds a zero byte, so it is not a text file",
                        root="l.txt"),
    "list of nothing there": Root({"l.txt": b"a.jpg\n"},
                                  "error: {root}: holds no usable image: {data}/a.jpg: no such file; remove",
                                  root="l.txt"),
}  # fmt: skip


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_every_kind_of_root(tmp_path: Path, root: Root):
    data = tmp_path / "data"
    for name, content in root.files.items():
        path = os.path.join(os.fsencode(data), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    root.prepare(data)
    before = tree(tmp_path)
    if "://" in root.root:
        given = root.root
    elif root.root.endswith(":"):
        given = root.root + str(data)
    else:
        given = str(data / root.root) if root.root else str(data)
    try:
        manifest, rejected = build(given)
    except UserError as error:
        message = f"error: {error}"
        assert message.startswith(root.outcome.format(root=given, data=data)), message
        assert "\n" not in message and not root.left_out
    else:
        assert manifest.description == root.outcome
        found = [(r.member or os.path.basename(r.file), r.reason, r.detail) for r in rejected]
        expected = [(member or found[i][0], *rest) for i, (member, *rest) in enumerate(root.left_out)]
        assert len(found) == len(expected)
        for (member, reason, detail), (m, r, d) in zip(found, expected, strict=True):
            assert (member, reason) == (m, r) and d in detail, (member, reason, detail)
        for i in range(len(manifest)):
            assert manifest.read(i, verify=True) == SOUND and manifest.fault(i) is None
    assert tree(tmp_path) == before


def test_how_many_kinds_of_bad_there_are():
    bad_files = [name for name, case in CASES.items() if case.outcome[0] in REASONS]
    bad_roots = [name for name, root in ROOTS.items() if root.outcome.startswith("error: ") or root.left_out]
    assert len(bad_files) >= 40 and len(bad_roots) >= 20, (len(bad_files), len(bad_roots))
    assert len(ROOTS) + len(CASES) >= 100


def test_nothing_is_written_elsewhere(tmp_path: Path, cache: Path):
    """Record Python's audit events while good and bad files are indexed and read: all changes lie in the cache."""
    data = tmp_path / "data"
    for name, case in CASES.items():
        if case.outcome[0] not in FORMATS or name in ("jpeg", "png", "webp", "bmp"):
            (data / f"{name.replace('/', '')}.jpg").write_bytes(case.content)
    (tmp_path / "s.tar").write_bytes(
        tar(*PAIR, ("/etc/x.jpg", SOUND), ("../y.jpg", SOUND), ("a.pyd", b"cos\nsystem\n."))
    )
    code = f"""
import os, sys
from cjepa_fast.config import DataConfig
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.index import open_sources
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views
from cjepa_fast.index import main
import torch, nvidia.dali.fn, nvidia.dali.pipeline
changed = set()
def hook(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        changed.add(args[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        changed.update(path for path in args[:2] if isinstance(path, (str, os.PathLike)))
sys.addaudithook(hook)
roots = [{str(data)!r}, {str(tmp_path / "s.tar")!r}]
assert main([*roots, "--processes", "1"]) == 0
source = open_sources(roots)
for batch in Batches(source, DataConfig(), Views(16), Order(0, 4, last_step=2), Place()):
    pass
print(*(os.path.abspath(path) for path in changed if isinstance(path, (str, os.PathLike))), sep="\\n")
"""
    before = tree(data)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    changed = done.stdout.split("\n")[:-1]
    assert len(changed) >= 4 and [path for path in changed if not path.startswith(f"{cache}/")] in ([], [str(cache)])
    assert tree(data) == before and sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "s.tar"]


def test_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Raise the errors by hand, as root may read everything."""
    data = tmp_path / "data"
    for name in ("a.jpg", "b.jpg"):
        (data / name).write_bytes(SOUND)
    open_file = os.open

    def refuse(path, *args, **options):
        if str(path).endswith("b.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    _, rejected = build(data)
    assert rejected == [Rejected(str(data / "b.jpg"), "", "unreadable", "cannot be read (Permission denied)")]

    def refuse_folder(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse_folder)
    with pytest.raises(UserError, match=r"data: cannot be listed \(Permission denied\); grant read access"):
        build(data)


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path):
    cache.write_text("a file in its place")
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)
    with pytest.raises(UserError, match=r"the cache cannot be written \(Not a directory\); point CJEPA_CACHE"):
        open_sources([str(tmp_path / "data")])


def _append_shard(data: Path) -> None:
    content = (data / "s.tar").read_bytes()
    (data / "s.tar").write_bytes(content[:2048] + tar(("b.jpg", SOUND)) if len(content) < 20480 else content)


CHANGES: dict[str, tuple[str, Callable[[Path], object], bool]] = {
    "file added": ("", lambda data: (data / "cat" / "new.jpg").write_bytes(SOUND), True),
    "file removed": ("", lambda data: (data / "cat" / "b.jpg").unlink(), True),
    "file renamed": ("", lambda data: (data / "cat" / "b.jpg").rename(data / "cat" / "c.jpg"), True),
    "file replaced": ("", lambda data: os.replace(data / "spare.bin", data / "cat" / "b.jpg"), True),
    "folder added": ("", lambda data: (data / "dog").mkdir(), True),
    "folder removed": ("", lambda data: (data / "empty").rmdir(), True),
    "file in an empty folder": ("", lambda data: (data / "empty" / "x.jpg").write_bytes(SOUND), True),
    "file written over in place": ("", lambda data: (data / "cat" / "b.jpg").write_bytes(SOUND + b"x"), False),
    "nothing": ("", lambda data: None, False),
    "shard grown": ("s.tar", lambda data: (data / "s.tar").write_bytes(tar(*PAIR, ("c.jpg", SOUND))), True),
    "shard of the same length": ("s.tar", lambda data: os.utime(data / "s.tar", ns=(1, 1)), True),
    "list grown": ("l.txt", lambda data: (data / "l.txt").write_bytes(b"cat/a.jpg\ncat/b.jpg\n"), True),
    "listed file removed": ("l.txt", lambda data: (data / "cat" / "a.jpg").unlink(), False),
    "new match": ("t-*.tar", lambda data: (data / "t-1.tar").write_bytes(tar(("z.jpg", SOUND))), True),
    "no new match": ("t-*.tar", lambda data: (data / "u-1.tar").write_bytes(tar(*PAIR)), False),
    "match removed": ("t-*.tar", lambda data: (data / "t-0.tar").unlink(), True),
}


@pytest.mark.parametrize(("root", "change", "seen"), CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(
    tmp_path: Path, root: str, change: Callable[[Path], object], seen: bool, caplog: pytest.LogCaptureFixture
):
    data = tmp_path / "data"
    for name, content in {
        "cat/a.jpg": SOUND, "cat/b.jpg": SOUND, "spare.bin": SOUND, "l.txt": b"cat/a.jpg\n",
        "s.tar": tar(*PAIR), "t-0.tar": tar(*PAIR), "t-9.tar": tar(("y.jpg", SOUND)),
    }.items():  # fmt: skip
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(content)
    (data / "empty").mkdir()
    given = str(data / root) if root else f"folder:{data}"
    open_sources([given])
    time.sleep(0.01)  # a clock tick of the file system
    change(data)
    caplog.clear()
    open_sources([given])
    assert bool(caplog.messages) == seen
    if seen:
        assert caplog.messages[0].startswith(f"indexing {given}: ") and len(caplog.messages) == 2


def test_a_thorough_index_serves_a_quick_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)
    open_sources([str(tmp_path / "data")], mode="thorough")
    caplog.clear()
    assert open_sources([str(tmp_path / "data")]).manifests[0].meta["mode"] == "thorough"
    assert caplog.messages == []
    open_sources([str(tmp_path / "data")], max_pixels=10**6)
    assert len(caplog.messages) == 2


def test_of_many_processes_one_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)
    build_once, built = index.build, []

    def slow(*args, **options):
        built.append(1)
        time.sleep(0.2)
        return build_once(*args, **options)

    monkeypatch.setattr(index, "build", slow)
    with ThreadPoolExecutor(4) as pool:
        assert [len(m) for m in pool.map(open_sources, [[str(tmp_path / "data")]] * 4)] == [1] * 4
    assert built == [1]


def test_roots_are_mixed(tmp_path: Path):
    for name, n in (("a", 4), ("b", 3)):
        (tmp_path / name).mkdir()
        for i in range(n):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(i, 10 + n, 20 + i))
    mixture = open_sources([f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=2"])
    assert len(mixture) == 7 and mixture.labels is None and mixture.weights == (0.5, 2.0)
    assert mixture.description == (
        "4 images in 1 folder, no labels, weight 0.5; 3 images in 1 folder, no labels, weight 2"
    )
    assert mixture.sizes.tolist() == [[14, 20], [14, 21], [14, 22], [14, 23], [13, 20], [13, 21], [13, 22]]
    assert mixture.source_of(np.arange(7)).tolist() == [0] * 4 + [1] * 3
    assert [mixture.name(i) for i in (3, 4)] == [str(tmp_path / "a" / "3.jpg"), str(tmp_path / "b" / "0.jpg")]
    assert mixture.read(5) == jpeg(1, 13, 21) and mixture.fault(5) is None
    ids, repeats = epoch_visits([4, 3], mixture.weights, seed=1, epoch=0)
    assert len(ids) == 8 and (ids >= 4).sum() == 6 and repeats.max() == 1
    (tmp_path / "b" / "2.jpg").write_bytes(b"")
    with pytest.raises(SampleError) as caught:
        mixture.read(6)
    assert caught.value.sample == 6
    error, image, other = mixture.read_many(np.array([6, 5, 0]))
    assert isinstance(error, SampleError) and (error.sample, str(error)) == (6, str(caught.value))
    assert (image, other) == (jpeg(1, 13, 21), jpeg(0, 14, 20))
    with pytest.raises(UserError, match="a weight is so small that an epoch visits none of its images"):
        open_sources([f"{tmp_path / 'a'}=0.1"])


def test_labels_of_a_mixture_need_the_same_classes(tmp_path: Path):
    for root, classes in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        for name in classes:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "1.jpg").write_bytes(SOUND)
    same = open_sources([str(tmp_path / "a"), str(tmp_path / "b")])
    assert same.classes == ("x", "y") and same.labels is not None and same.labels.tolist() == [0, 1, 0, 1]
    other = open_sources([str(tmp_path / "a"), str(tmp_path / "c")])
    assert other.classes == () and other.labels is None
    assert other.description.endswith("weight 1; labels not used as the sources name different classes")
    assert "not used" not in same.description


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: Path):
    data = tmp_path / "data"
    (data / "a.jpg").write_bytes(SOUND)
    (data / "b.jpg").write_bytes(SOUND[:-9])
    before = tree(data)
    assert main([str(data), "--processes", "1"]) == 0
    folder = cached_manifest(str(data), mode="thorough", max_pixels=178_956_970).parent
    report = folder / "bad_samples.jsonl"
    assert caplog.messages[0].startswith(
        f"{data}: 1 image in 1 folder, no labels; 1 left out (1 truncated); see {report}\nmanifest: {folder}/manifest ("
    )
    (line,) = report.read_text().splitlines()
    assert json.loads(line) == {
        "file": str(data / "b.jpg"), "member": "", "reason": "truncated",
        "detail": f"ends after {len(SOUND) - 9} bytes, before its end marker",
    }  # fmt: skip
    caplog.clear()
    assert main([str(data), "--processes", "1"]) == 0
    assert "unchanged since it was indexed" in caplog.messages[0]
    assert main([str(data), "--processes", "1", "--force"]) == 0
    assert "images/s" in caplog.messages[1]
    assert tree(data) == before
    assert {name.split("/")[0] for name in tree(tmp_path)} == {"data", "cache"}
    assert {p.name for p in folder.iterdir()} == {"manifest", "bad_samples.jsonl", "lock"}


def test_processes_find_what_threads_find(tmp_path: Path):
    data = tmp_path / "data"
    for i in range(600):
        (data / f"{i % 3}").mkdir(exist_ok=True)
        (data / f"{i % 3}" / f"{i}.jpg").write_bytes(SOUND if i % 100 else b"")
    command = [sys.executable, "-m", "cjepa_fast.index", str(data), "--processes", "2", "--out", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected, rejected = build(data)
    good = [i for i in sorted(range(600), key=lambda i: f"{i % 3}/{i}.jpg") if i % 100]
    assert list(expected.names) == [f"{i}.jpg" for i in good] and (expected.entries["bytes"] == len(SOUND)).all()
    expected.save(tmp_path / "n")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()
    lines = (tmp_path / "m.bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [r._asdict() for r in rejected] and len(lines) == 6


@pytest.mark.parametrize("shown", [True, False, None])
def test_progress_counts_every_image(tmp_path: Path, shown: bool | None, capsys: pytest.CaptureFixture[str]):
    """The bar shows on a terminal, not in a log file."""
    for i in range(300):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(SOUND if i % 3 else b"")
    with ThreadPoolExecutor(2) as pool:
        index.build(find_source(str(tmp_path / "data")), mode="quick", pool=pool, progress=shown)
    said = capsys.readouterr().err
    assert ("100%" in said and "300/300" in said and "images/s" in said) if shown else said == ""


def test_a_manifest_is_a_root(tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "mine.index"
    (data / "a.jpg").write_bytes(SOUND)
    assert main([str(data), "--out", str(out), "--processes", "1"]) == 0
    assert not (tmp_path / "cache").exists()
    assert open_sources([str(out)]).read(0) == SOUND
    (data / "b.jpg").write_bytes(SOUND)
    with pytest.raises(UserError, match=r"mine.index: .*data changed since it was indexed; index the images again"):
        open_sources([str(out)])
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"mine.index: the index file is damaged; index the images again"):
        open_sources([str(out)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["{data}", "--out", "{tmp}/notes.txt"],
            "{tmp}/notes.txt: exists and is not a manifest; give --out another name",
        ),
        (["{data}", "--out", "{data}/m"], "{data}/m: lies in the folder that is indexed"),
        (["{data}", "--out", "{data}/sub/m"], "{data}/sub/m: lies in the folder that is indexed"),
        (["{data}", "--report", "{data}/r"], "{data}/r: lies in the folder that is indexed"),
        (["{data}", "{data}", "--out", "{tmp}/m"], "--out and --report: take one DATA, got several"),
        (["{data}", "--out", "/proc/nowhere/m"], "/proc/nowhere/m"),
        (["{tmp}/none"], "{tmp}/none: no such file or folder"),
        (["{data}=0"], "{data}=0: '0' is not a weight"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    places = {"data": tmp_path / "data", "tmp": tmp_path}
    assert main([*(a.format(**places) for a in arguments), "--processes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says.format(**places)}") and error.count("\n") == 1
    kept = {name: content for name, content in tree(tmp_path).items() if not name.startswith("cache")}
    assert kept == before


@pytest.mark.parametrize("option", [["--processes", "0"], ["--max-pixels", "many"], ["--mode", "slow"]])
def test_bad_options(tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "data"), *option])
    assert caught.value.code == 2 and option[0] in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "build", interrupt)
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "m"), "--processes", "1"]) == 130
    assert sorted(tree(tmp_path)) == ["data/a.jpg"]


def test_a_killed_worker_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "data" / "a.jpg").write_bytes(SOUND)
    monkeypatch.setattr(scan, "inspect_files", die)
    assert main([str(tmp_path / "data"), "--processes", "2"]) == 2
    assert "a process that read it was killed, perhaps for memory; lower --processes" in capsys.readouterr().err


def die(*_: object, **__: object) -> None:
    os._exit(9)


def test_a_killed_command_keeps_nobody_waiting(tmp_path: Path):
    """The workers inherit the lock, so they must end with the command."""
    script = """
import os, sys, time
from pathlib import Path
from cjepa_fast.cache import locked
from cjepa_fast.index import workers
with locked(Path(sys.argv[1])), workers(2) as pool:
    pool.submit(os.getpid).result()
    print("indexing", flush=True)
    time.sleep(60)
"""
    command = subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == b"indexing\n"
    command.kill()
    command.communicate(timeout=10)  # ends when no worker holds the pipe
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
