"""Sources, listings and shards: weights and patterns, tars against tarfile, lists, parquet files."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_images import jpeg
from cjepa_fast.errors import UserError
from cjepa_fast.feed.shards import Member, ShardFault, list_shard, tar_members
from cjepa_fast.feed.sources import expand_pattern, find_source, parse_root, printable
from indexing import build

IMAGE = jpeg()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data", ("/data", 1.0)),
        ("/data=2", ("/data", 2.0)),
        ("/data=0.25", ("/data", 0.25)),
        ("/a=b/c=1e-3", ("/a=b/c", 1e-3)),
        ("s-{0..3}.tar=3", ("s-{0..3}.tar", 3.0)),
    ],
)
def test_weights_of_roots(text: str, expected: tuple[str, float]):
    assert parse_root(text) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan", "two", ""])
def test_bad_weights(weight: str):
    with pytest.raises(UserError, match=r"is not a weight; write PATH=2 or PATH=0.5, above 0"):
        parse_root(f"/data={weight}")


def test_a_path_that_exists_is_no_weight(tmp_path: Path):
    (tmp_path / "lr=2").mkdir()
    assert parse_root(str(tmp_path / "lr=2")) == (str(tmp_path / "lr=2"), 1.0)
    assert parse_root(f"{tmp_path}/lr=2=3") == (str(tmp_path / "lr=2"), 3.0)


def test_patterns(tmp_path: Path):
    for name in ("s-008", "s-009", "s-010", "t-1", "s-x"):
        (tmp_path / f"{name}.tar").write_bytes(b"")

    def expand(pattern: str) -> list[str]:
        return [Path(p).stem for p in expand_pattern(f"{tmp_path}/{pattern}")]

    assert expand("s-{008..010}.tar") == ["s-008", "s-009", "s-010"]
    assert expand("s-{010..008}.tar") == ["s-008", "s-009", "s-010"]
    assert expand("{s-010,t-1}.tar") == ["s-010", "t-1"]
    assert expand("s-0{08..09}.tar") == ["s-008", "s-009"]
    assert expand("s-*.tar") == ["s-008", "s-009", "s-010", "s-x"]
    assert expand("{s,t}-[1x].tar") == ["s-x", "t-1"]
    assert expand("{s-010,s-0*}.tar") == ["s-008", "s-009", "s-010"]
    with pytest.raises(UserError, match="more than a million files"):
        expand_pattern("{0..99999999999}.tar")


def test_a_name_with_braces_that_exists_is_no_pattern(tmp_path: Path):
    (tmp_path / "a{0..1}[x]").mkdir()
    (tmp_path / "a{0..1}[x]" / "1.jpg").write_bytes(IMAGE)
    assert find_source(str(tmp_path / "a{0..1}[x]")).kind == "folder"


def test_names_in_messages_stay_on_one_line():
    assert printable("/a/é 1.jpg") == "/a/é 1.jpg"
    assert printable("/a/\n\udcff.jpg") == "/a/\\n\\udcff.jpg"


def members(content: bytes, folder: Path) -> tuple[list[Member], str]:
    """Return the members that tar_members finds, and its fault."""
    path = folder / "x.tar"
    path.write_bytes(content)
    found: list[Member] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for member in tar_members(fd):
            found.append(member)
    except ShardFault as fault:
        return found, str(fault)
    finally:
        os.close(fd)
    return found, ""


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150
)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    entries=st.lists(st.tuples(NAMES, st.integers(0, 1500), st.sampled_from("ffffdlh"), st.integers(0, 2)), max_size=8),
)
def test_tars_are_read_as_tarfile_does(
    form: int, entries: list[tuple[str, int, str, int]], tmp_path_factory: pytest.TempPathFactory
):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, size, kind, depth in entries:
            info = tarfile.TarInfo("/".join(["folder" * 5] * depth + [name]))
            kinds = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}
            info.type = kinds[kind]
            info.size = size if kind == "f" else 0
            info.linkname = "elsewhere" if kind in "lh" else ""
            try:
                archive.addfile(info, io.BytesIO(b"x" * size))
            except ValueError:  # ustar takes neither long names nor, in some places, other letters
                continue
    content = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    found, fault = members(content, tmp_path_factory.mktemp("tar"))
    assert not fault
    assert [m._replace(name=m.name.rstrip("/")) for m in found] == [
        m._replace(name=m.name.rstrip("/")) for m in expected
    ]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_tar_goes_beyond_it(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Every member lies inside the file, and reading ends, with any claim of the headers."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(3):
            info = tarfile.TarInfo("é" * 80 * i + f"{i}.jpg")
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    for at in range(0, len(content), 512):  # so that the damage passes as sound
        block = content[at : at + 512]
        if data.draw(st.booleans()) and any(block):
            content[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    found, _ = members(bytes(content), tmp_path_factory.mktemp("tar"))
    assert all(m.offset >= 0 and m.offset + m.size <= len(content) for m in found)


def test_large_sizes_in_base_256(tmp_path: Path):
    """Octal digits cannot state a member over 8 GiB; its end outside the file is a fault."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 * 2**30
    found, fault = members(info.tobuf(tarfile.GNU_FORMAT), tmp_path)
    assert found == [] and fault == "ends at byte 512, inside a member"
    found, fault = members(info.tobuf(tarfile.PAX_FORMAT), tmp_path)
    assert found == [] and "inside a member" in fault


def test_a_name_of_a_million_bytes_is_a_fault(tmp_path: Path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("x" * 10**6 + ".jpg"))
    assert members(file.getvalue(), tmp_path) == ([], "holds a name of 1,000,005 bytes at byte 512")


def tar(*entries: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_members_are_grouped_as_webdataset_does(tmp_path: Path):
    other = jpeg(1)
    (tmp_path / "s.tar").write_bytes(tar(
        ("x/1.0.mask.png", b"no image"), ("x/1.jpg", IMAGE), ("x/1.cls", b"5"),  # the first dot ends the key
        ("a.b/2.seg.jpg", b""), ("a.b/2.PNG", other), ("a.b/2.json", b'{"label": 6, "x": "\\ud800"}'),
        ("3.txt", b"a caption"), ("3.thumb.webp", other), ("._3.jpg", b""), ("dir/", b""),
        ("4.jpg", IMAGE), ("1.cls", b"99"), ("4.cls", b" -1\n"), ("3.cls", b"8"),  # parts may lie apart
    ))  # fmt: skip
    listing = list_shard("tar", str(tmp_path), "s.tar")
    assert listing.name == ["x/1.jpg", "a.b/2.PNG", "3.thumb.webp", "4.jpg"]
    assert listing.label == [5, 6, 8, -1] and listing.containers == ["s.tar"]
    assert [(r.member, r.reason) for r in listing.rejected] == [("1", "no image"), ("dir", "no image")][:1]
    manifest, rejected = build(tmp_path / "s.tar")
    assert manifest.classes == ("-1", "5", "6", "8") and manifest.labels is not None
    assert manifest.labels.tolist() == [1, 2, 3, 0] and len(rejected) == 1
    assert [manifest.read(i, verify=True) for i in range(4)] == [IMAGE, other, other, IMAGE]
    assert manifest.name(1) == f"{tmp_path}/s.tar: a.b/2.PNG at byte {listing.offset[1]:,}"


def test_nothing_in_a_shard_is_executed_or_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pack pickles under every name that libraries unpickle: none of their bytes is read."""
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    payload = pickle.dumps(Bomb())
    endings = ("pyd", "pkl", "pickle", "npy", "npz", "pth", "pt", "ten", "tb", "mp", "msg", "cbor", "zip", "yaml")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "s.tar").write_bytes(
        tar(("a.jpg", IMAGE), *((f"a.{e}", payload) for e in endings), ("a.json", payload), ("a.cls", payload[:30]))
    )
    read: list[tuple[int, int]] = []
    pread = os.pread

    def watched(fd: int, n: int, offset: int) -> bytes:
        read.append((offset, n))
        return pread(fd, n, offset)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(os, "pread", watched)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(tarfile, "open", refuse)
    manifest, _ = build(tmp_path / "d")
    assert manifest.read(0) == IMAGE and manifest.labels is None and not canary.exists()
    with open(tmp_path / "d" / "s.tar", "rb") as file:
        found = {m.name: m for m in tar_members(file.fileno())}
    for ending in endings:
        member = found[f"a.{ending}"]
        end = member.offset + member.size
        assert all(at + n <= member.offset or at >= end for at, n in read), ending
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d", "s.tar"]


def test_lists_give_paths_and_labels(tmp_path: Path):
    data = tmp_path / "images"
    data.mkdir()
    for name in ("a.jpg", "b c.jpg", "noending", "d,e.jpg"):
        (data / name).write_bytes(IMAGE)
    absolute = tmp_path / "lists" / "x.txt"
    absolute.parent.mkdir()
    cases = {
        "x.txt": (f"../images/a.jpg\n{data}/b c.jpg\n", None),
        "tab.txt": ("../images/noending\tcat\n../images/b c.jpg\tdog\n", ["cat", "dog"]),
        "numbers.txt": ("../images/a.jpg 10\n../images/b c.jpg  9\n", [10, 9]),
        "some.txt": ("../images/a.jpg 10\n../images/b c.jpg\n", None),
        "plain.csv": ("../images/a.jpg\n../images/b c.jpg\n", None),
        "head.csv": ("id,File_Name,LABEL\n0,../images/a.jpg,x\n1,../images/b c.jpg,y\n", ["x", "y"]),
        "nohead.csv": ('../images/a.jpg,x\n"../images/d,e.jpg",y\n', ["x", "y"]),
        "t.tsv": ("label\tpath\nx\t../images/a.jpg\nx\t../images/d,e.jpg\n", ["x", "x"]),
    }
    for name, (text, expected) in cases.items():
        (absolute.parent / name).write_text(text)
        manifest, rejected = build(absolute.parent / name)
        assert len(manifest) == 2 and not rejected, name
        assert [manifest.read(i) for i in range(2)] == [IMAGE, IMAGE]
        if expected is None:
            assert manifest.labels is None, name
        else:
            assert manifest.labels is not None
            assert [manifest.classes[k] for k in manifest.labels] == list(map(str, expected)), name
    assert manifest.path(0) == f"{absolute.parent}/../images/a.jpg"
    (tmp_path / "odd.lst").write_text("images/a.jpg\n")
    assert len(build(f"list:{tmp_path}/odd.lst")[0]) == 1


try:
    import pyarrow
    import pyarrow.parquet

    PYARROW = ""
except ImportError:
    PYARROW = "pyarrow is not installed"
needs_pyarrow = pytest.mark.skipif(bool(PYARROW), reason=PYARROW)


def hugging_face(path: Path, contents: list[bytes | None], labels: list[int] | None = None, **options: Any) -> None:
    """Write rows as Hugging Face's `datasets` does."""
    columns: dict[str, Any] = {"image": [{"bytes": c, "path": f"{i}.jpg"} for i, c in enumerate(contents)]}
    metadata = None
    if labels is not None:
        columns["label"] = labels
        features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path, **options)


@needs_pyarrow
def test_parquet_of_hugging_face(tmp_path: Path):
    contents = [jpeg(i, 20 + i, 30) for i in range(25)]
    hugging_face(tmp_path / "train-0.parquet", contents[:20], [i % 2 for i in range(20)], row_group_size=6)
    hugging_face(tmp_path / "train-1.parquet", contents[20:], [1] * 5)
    manifest, rejected = build(tmp_path)
    assert manifest.description == "25 images in 2 parquet files, 2 labels" and rejected == []
    assert manifest.classes == ("cat", "dog") and manifest.labels is not None
    assert manifest.labels.tolist() == [i % 2 for i in range(20)] + [1] * 5
    assert manifest.sizes[:, 0].tolist() == [20 + i for i in range(25)]
    order = np.random.default_rng(0).permutation(25).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: manifest.read(i, verify=True) == contents[i], order))
    assert manifest.name(21) == f"{tmp_path}/train-1.parquet: row 1" and manifest.fault(21) is None


@needs_pyarrow
def test_parquet_of_plain_bytes_with_bad_rows(tmp_path: Path):
    rows = [IMAGE, b"", None, IMAGE[:-5], IMAGE]
    kind = pyarrow.large_binary()
    table = pyarrow.table({"data": pyarrow.array(rows, kind), "text": ["x"] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    manifest, rejected = build(tmp_path / "p.parquet")
    assert [(r.member, r.reason) for r in rejected] == [
        ("row 1", "empty"), ("row 2", "missing"), ("row 3", "truncated")
    ]  # fmt: skip
    assert [manifest.read(i) for i in range(2)] == [IMAGE, IMAGE] and manifest.labels is None
    hugging_face(tmp_path / "n.parquet", [None, IMAGE])
    assert [r.reason for r in build(tmp_path / "n.parquet")[1]] == ["missing"]


@needs_pyarrow
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b""), "is not a readable parquet file"),
        (lambda p: p.write_bytes(b"PAR1" + bytes(99)), "is not a readable parquet file"),
        (lambda p: pyarrow.parquet.write_table(pyarrow.table({"x": [1], "y": ["a"]}), p),
         "has no image column; its columns are x, y"),
        (lambda p: pyarrow.parquet.write_table(pyarrow.table({"x": [b"1"], "y": [b"a"]}), p),
         "has no image column; its columns are x, y"),
        (lambda p: pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], "binary")}), p),
         "holds no image; give a folder, shards or a list that does"),
        (lambda p: (hugging_face(p, [IMAGE] * 9), p.write_bytes(p.read_bytes()[:-99])), "is not a readable parquet"),
        (lambda p: (hugging_face(p, [os.urandom(999) for _ in range(9)], compression="none"),
                    p.write_bytes(p.read_bytes()[:4] + b"\xff" * 3000 + p.read_bytes()[3004:])), "damaged"),
    ],
)  # fmt: skip
def test_bad_parquet_files(tmp_path: Path, make: Any, says: str):
    path = tmp_path / "p.parquet"
    make(path)
    with pytest.raises(UserError) as caught:
        build(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: holds no ") and says in message and "\n" not in message, message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"p\.parquet: needs pyarrow; pip install 'cjepa-fast\[parquet\]'"):
        build(tmp_path)


def test_split_words_are_found_in_names_only(tmp_path: Path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "trainset", "evaluation-x"):
        (tmp_path / f"{name}.tar").write_bytes(tar((f"{name}.jpg", IMAGE)))
    assert len(find_source(str(tmp_path)).files) == 4
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation_0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shards of train and validation; name one"):
        find_source(str(tmp_path))


def test_unsupported_tar_flavours(tmp_path: Path):
    """Refuse GNU sparse members in pax form, whose data is shorter than their size."""
    record = b"30 GNU.sparse.realsize=100000\n"
    info = tarfile.TarInfo("x")
    info.size, info.type = len(record), tarfile.XHDTYPE
    content = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar(("a.jpg", IMAGE))
    assert members(content, tmp_path) == ([], "holds sparse members; pack it without --sparse")
