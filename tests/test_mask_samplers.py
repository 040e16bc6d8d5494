"""The samplers in C++ and NumPy: the same bits as each other and as every earlier version, and the same refusals."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cjepa_fast import ops
from cjepa_fast.masks import MODES
from cjepa_fast.native import host as native
from cjepa_fast.philox import philox4x32
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskSpec, Mode
from masking import assert_equal, make

ROOT = Path(__file__).resolve().parents[1]
RANDOM123 = (  # Random123's known answers for philox4x32-10: counter, key, output
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.fixture(scope="module")
def library() -> None:
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(f"the C++ sampler is not available: {reason}")


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: int, words: tuple[int, ...]) -> None:
    counters = np.tile(np.array(counter, np.uint32), (2, 3, 1))
    assert (philox4x32(counters, (key & 0xFFFFFFFF, key >> 32)) == np.array(words, np.uint32)).all()


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_of_the_library(
    library: None, counter: tuple[int, int, int, int], key: int, words: tuple[int, ...]
) -> None:
    assert native.philox4x32(counter, key) == words


GRIDS = ((6, 6), (7, 7), (8, 8), (14, 14), (16, 16), (28, 28), (8, 12), (64, 64), (1, 5), (2, 64))


@st.composite
def specs(draw: st.DrawFn) -> MaskSpec:
    """Draw a spec that the samplers accept; some need many redraws, never succeed, or have too little room."""
    mode = draw(st.sampled_from(Mode))
    grids = [grid for grid in GRIDS if mode != Mode.RASTERIZED or grid[0] % 2 == grid[1] % 2 == 0]
    if mode == Mode.FAITHFUL:
        grids = [grid for grid in grids if min(grid) > 1]
    height, width = draw(st.sampled_from(grids))
    side_h = st.integers(1, height - (mode == Mode.FAITHFUL))
    side_w = st.integers(1, width - (mode == Mode.FAITHFUL))
    targets, target, window = draw(st.integers(1, 7)), (draw(side_h), draw(side_w)), (draw(side_h), draw(side_w))
    if mode == Mode.RASTERIZED:
        targets, target, window = 3, (height // 2, width // 2), (height // 2, width // 2)
    elif mode == Mode.BLOCK:
        targets, window = 1, (height, width)
    elif mode == Mode.RANDOM:
        targets, target, window = 1, (1, draw(st.integers(1, height * width))), (height, width)
    complement = mode in (Mode.RASTERIZED, Mode.BLOCK, Mode.RANDOM)
    left = height * width - targets * math.prod(target)
    return MaskSpec(
        *(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32 - 1)), mode, height, width, targets),
        *(*target, *window),
        min_keep=draw(st.integers(0, math.prod(window) - 1)),
        keep=left if complement else draw(st.integers(0, math.prod(window))),
        cap=draw(st.integers(0, 30 * height * width)),
        union_cap=draw(st.integers(0, 30 * height * width)),
    )


ids_lists = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40)  # the C++ core takes 16 at a time


@settings(max_examples=400, deadline=None)
@given(spec=specs(), ids=ids_lists, threads=st.integers(1, 4), inverse=st.booleans(), union=st.booleans())
def test_native_equals_numpy_bit_for_bit(
    library: None, spec: MaskSpec, ids: list[int], threads: int, inverse: bool, union: bool
) -> None:
    array = np.array(ids, np.int64)
    reference_masks.check(spec, array)
    try:
        expected = reference_masks.sample(spec, array, inverse=inverse, union=union)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="no context"):
            native.sample_masks(spec, array, threads)
        return
    assert_equal(native.sample_masks(spec, array, threads, inverse=inverse, union=union), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [6, 8, 14, 16, 28, (8, 12)])
def test_samplers_agree(library: None, grid: int | tuple[int, int], mode: str) -> None:
    fast, plain = (make(mode, grid, seed=2**40 + 3, min_keep=3, impl=impl) for impl in ("native", "numpy"))
    assert fast.shapes() == plain.shapes()
    for step in (0, 2**32 - 1):
        for ids in (np.arange(64), 2**62 - np.arange(5)):
            assert fast.spec(step, len(ids), union=True) == plain.spec(step, len(ids), union=True)
            ours, theirs = (sampler.sample(step, ids, inverse=True, union=True) for sampler in (fast, plain))
            assert_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_nothing(library: None, mode: str) -> None:
    ids = np.arange(2500) * 7
    spec = make(mode).spec(3, len(ids), union=True)
    one = native.sample_masks(spec, ids, 1, inverse=True, union=True)
    for threads in (2, 3, 8, 3000):
        assert_equal(native.sample_masks(spec, ids, threads, inverse=True, union=True), one)


@pytest.mark.parametrize(
    ("grid", "mode", "min_keep", "digest"),
    [
        (14, "fixed", 10, "642f8746bb83cfaa"),
        (14, "faithful", 10, "b97ef77406faa3b0"),
        ((8, 12), "fixed", 3, "7df80c3555c0f02f"),
        ((8, 12), "faithful", 3, "64283738f1539f21"),
        (28, "fixed", 10, "b1cd7dcabe544925"),
        (64, "faithful", 10, "49909a7a76e1c200"),
        (14, "packed", 10, "6cc623728dc2354d"),
        (14, "rasterized", 10, "b6f1feaf681f634c"),
        (14, "block", 10, "c077f8f5f119aa5e"),
        (14, "random", 10, "0b6e218e6e88af73"),
    ],
)
def test_masks_stay_what_they_were(grid: int | tuple[int, int], mode: str, min_keep: int, digest: str) -> None:
    """The digests are of the first version, so that later versions resume its runs and repeat its results."""
    sampler, found = make(mode, grid, seed=2**40 + 3, min_keep=min_keep), hashlib.sha256()
    for step in (0, 1, 77, 2**32 - 1):
        for indices in sampler.sample(step, [0, 1, 5, 2**31, 2**62 + 9, *range(100, 160)])[:2]:
            found.update(str(tuple(indices.shape)).encode())
            found.update(indices.numpy().astype("<i2").tobytes())
    assert found.hexdigest()[:16] == digest


GOOD = MaskSpec(1, 2, Mode.FIXED, 14, 14, 4, 6, 6, 13, 13, 10, 45)
RASTERIZED = MaskSpec(1, 2, Mode.RASTERIZED, 14, 14, 3, 7, 7, 7, 7, 10, 49)
BLOCK = MaskSpec(1, 2, Mode.BLOCK, 14, 14, 1, 10, 11, 14, 14, 10, 86)
RANDOM = MaskSpec(1, 2, Mode.RANDOM, 14, 14, 1, 1, 100, 14, 14, 10, 96)


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (GOOD, {"seed": -1}, "seed=-1 "),
        (GOOD, {"seed": 2**64}, f"seed={2**64} "),
        (GOOD, {"step": 2**32}, f"step={2**32} "),
        (GOOD, {"mode": 6}, "mode=6 "),
        (GOOD, {"height": 65}, "height=65 "),
        (GOOD, {"width": 0}, "width=0 "),
        (GOOD, {"num_targets": 65}, "num_targets=65 "),
        (GOOD, {"num_targets": 0}, "num_targets=0 "),
        (GOOD, {"target_h": 15}, "target_h=15 "),
        (GOOD, {"target_w": 0}, "target_w=0 "),
        (GOOD, {"context_w": 15}, "context_w=15 "),
        (GOOD, {"keep": 170}, "keep=170 "),
        (GOOD, {"keep": -1}, "keep=-1 "),
        (GOOD, {"min_keep": -1}, "min_keep=-1 "),
        (GOOD, {"cap": -1}, "cap=-1 "),
        (GOOD, {"union_cap": 2**31}, f"union_cap={2**31} "),
        (GOOD, {"mode": Mode.FAITHFUL, "target_h": 14}, "target_h=14 "),
        (GOOD, {"mode": Mode.FAITHFUL, "context_h": 14}, "context_h=14 "),
        (GOOD, {"mode": Mode.FAITHFUL, "min_keep": 169}, "min_keep=169 "),
        (GOOD, {"mode": Mode.PACKED, "min_keep": 169}, "min_keep=169 "),
        (RASTERIZED, {"num_targets": 4}, "num_targets=4 "),
        (RASTERIZED, {"height": 15}, "target_h=7 "),
        (RASTERIZED, {"target_w": 6}, "target_w=6 "),
        (RASTERIZED, {"keep": 48}, "keep=48 "),
        (BLOCK, {"num_targets": 2}, "num_targets=2 "),
        (BLOCK, {"context_h": 13}, "context_h=13 "),
        (BLOCK, {"keep": 87}, "keep=87 "),
        (RANDOM, {"num_targets": 4}, "num_targets=4 "),
        (RANDOM, {"target_h": 2}, "target_h=2 "),
        (RANDOM, {"target_w": 197}, "target_w=197 "),
        (RANDOM, {"keep": 95}, "keep=95 "),
        (GOOD, {"ids": np.arange(4, dtype=np.int32)}, "int32"),
        (GOOD, {"ids": np.arange(4.0)}, "float64"),
        (GOOD, {"ids": np.arange(8)[::2]}, "stride 16"),
        (GOOD, {"ids": np.arange(4)[None]}, "[1, 4]"),
        (GOOD, {"ids": np.arange(0)}, "[0]"),
        (GOOD, {"ids": np.array([3, -7])}, "-7"),
        (GOOD, {"ids": [1, 2]}, "list"),
        (GOOD, {"ids": torch.arange(4, device="meta")}, "meta"),
    ],
)
@pytest.mark.parametrize("impl", ["native", "numpy"])
def test_ops_refuse_bad_arguments_with_the_value(
    library: None, impl: str, spec: MaskSpec, changes: dict[str, Any], words: str
) -> None:
    ids = changes.get("ids", np.arange(4))
    spec = spec._replace(**{name: value for name, value in changes.items() if name != "ids"})
    with pytest.raises(ValueError) as refused:
        ops.sample_masks(spec, ids, impl=impl)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    if impl == "native" and "ids" not in changes and not {"seed", "step"} & set(changes):
        with pytest.raises((RuntimeError, ValueError), match=r"impossible|negative"):
            native.sample_masks(spec, ids)


def declared(header: str, struct: str) -> list[tuple[str, str]]:
    """Return the (type, name) of each field of a struct, in order."""
    body = re.sub(r"//.*", "", header.split(f"struct {struct} {{")[1].split("};")[0])
    fields = (line.strip().split(maxsplit=1) for line in body.split(";") if line.strip())
    return [(kind, name.strip()) for kind, names in fields for name in names.split(",")]


def test_the_library_reads_the_fields_in_their_order() -> None:
    header = (ROOT / "csrc" / "mask_spec.h").read_text()
    kinds = {ctypes.c_uint64: "uint64_t", ctypes.c_uint32: "uint32_t", ctypes.c_int32: "int32_t"}
    assert declared(header, "MaskSpec") == [(kinds[kind], name) for name, kind, *_ in native.Spec._fields_]
    kinds = {np.dtype("int16"): "int16_t*", np.dtype("int32"): "int32_t*"}
    masks = make("packed").spec(0, 3, union=True)
    arrays = native.sample_masks(masks, np.arange(3), inverse=True, union=True)
    names = [name.removesuffix("_patches") for _, name in declared(header, "MaskOutputs")]  # C++ has a keyword `union`
    assert names == [name for name, *_ in native.Outputs._fields_]
    assert [kind for kind, _ in declared(header, "MaskOutputs")] == [kinds[array.dtype] for array in arrays]


field_values = st.dictionaries(
    st.sampled_from([name for name in MaskSpec._fields if name not in ("seed", "step")]),
    st.sampled_from((0, 1, 3, 7, 64, 65, -1)),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(spec=specs(), changes=field_values)
def test_library_and_check_refuse_the_same(library: None, spec: MaskSpec, changes: dict[str, int]) -> None:
    spec, ids = spec._replace(**changes), np.arange(3)
    try:
        reference_masks.check(spec, ids)
    except ValueError:
        with pytest.raises((RuntimeError, ValueError), match=r"impossible|negative"):
            native.sample_masks(spec, ids)
        return
    try:
        native.sample_masks(spec, ids)
    except RuntimeError as error:
        assert "no context" in str(error)
