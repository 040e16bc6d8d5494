"""Encoded images: an exact outcome for every kind, agreement with DALI, and bounded cost."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bad_images import CASES, SOUND, Case, encode, jpeg, jpeg_frame, png_bomb, png_header, tree
from cjepa_fast.feed.images import FORMATS, REASONS, BadImage, inspect, inspect_header
from cjepa_fast.feed.scan import Mode, inspect_files
from indexing import build

ROOT = Path(__file__).parents[1]


def matches(found: tuple, expected: tuple) -> bool:
    return found == expected or (found[0] == expected[0] and isinstance(expected[1], str) and expected[1] in found[1])


@pytest.mark.parametrize("mode", ["quick", "thorough"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_image(data: Path, case: Case, mode: Mode):
    (data / case.file).write_bytes(case.content)
    (data / "zz.jpg").write_bytes(SOUND)
    before = tree(data)
    manifest, rejected = build(data, mode)
    expected = (case.quick or case.outcome) if mode == "quick" else case.outcome
    if expected[0] in FORMATS:
        assert rejected == [] and len(manifest) == 2
        entry = manifest.entries[0]
        assert (FORMATS[entry["format"]], entry["height"], entry["width"]) == expected
        assert entry["bytes"] == len(case.content) and manifest.read(0, verify=True) == case.content
        assert entry["crc32"] == (zlib.crc32(case.content) if mode == "thorough" else 0)
    else:
        ((file, member, reason, detail),) = rejected
        assert (file, member, len(manifest)) == (str(data / case.file), "", 1)
        assert reason in REASONS and matches((reason, detail), expected), (reason, detail)
    assert tree(data) == before


def by_dali(content: bytes, top_left: tuple[int, int] | None = None) -> np.ndarray | None:
    """Return DALI's pixels of an encoded image, or of its part from `top_left` on; None if DALI fails."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=lambda: [np.frombuffer(content, dtype=np.uint8)])
        if top_left is None:
            pipeline.set_outputs(fn.decoders.image(encoded))
        else:
            pipeline.set_outputs(fn.decoders.image_slice(encoded, start=top_left, rel_end=(1.0, 1.0), axis_names="HW"))
    try:
        (images,) = pipeline.run()
    except RuntimeError:
        return None
    return images.at(0).copy()


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.content], ids=[n for n, c in CASES.items() if c.content]
)
def test_dali_agrees(case: Case):
    """DALI decodes every accepted image, whole and in part, at the same size, and no refused one that is not marked."""
    if case.outcome[0] in ("empty", "too many pixels") or case.dali == "crashes":
        return  # no input to DALI, 11 GB of memory, or the end of this process
    whole = by_dali(case.content)
    if case.dali == "decodes":
        assert case.outcome[0] not in FORMATS and whole is not None
    elif case.outcome[0] not in FORMATS:
        assert whole is None
    else:
        assert whole is not None and whole.shape[:2] == case.outcome[1:]
        top, left = whole.shape[0] // 3, whole.shape[1] // 2
        part = by_dali(case.content, (top, left))
        assert part is not None and np.array_equal(part, whole[top:, left:])


def test_dali_dies_of_what_is_marked_to_crash_it():
    """A damaged EXIF block in a PNG ends the process. Once DALI survives it, the check can go."""
    content = CASES["png damaged EXIF"].content
    code = f"""
import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
content = np.frombuffer({content!r}, dtype=np.uint8)
pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
with pipeline:
    pipeline.set_outputs(fn.decoders.image(fn.external_source(source=lambda: [content])))
pipeline.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode != 0


def test_every_truncation_is_seen():
    """Cut formats that state their length, and JPEGs, at many bytes."""
    for name in (
        "jpeg",
        "jpeg progressive",
        "jpeg with restarts",
        "png",
        "webp",
        "webp lossless",
        "bmp",
        "ppm",
        "tiff",
    ):
        content = CASES[name].content
        step = max(1, len(content) // 400)
        for n in [*range(1, len(content), step), len(content) - 1, len(content) - 2]:
            with pytest.raises(BadImage):
                inspect(content[:n])


def test_holes_and_noise_in_photographs_are_seen():
    """Put 4 kB of zeros or noise anywhere in a JPEG's compressed data, as a torn download or a dying disk does."""
    content = noisy_jpeg()
    scan = content.rindex(b"\xff\xda")
    rng = np.random.default_rng(0)
    seen = {"zeros": 0, "noise": 0}
    for _ in range(100):
        at = int(rng.integers(scan + 20, len(content) - 9000))
        for kind, junk in (("zeros", bytes(4096)), ("noise", rng.bytes(4096))):
            try:
                inspect(content[:at] + junk + content[at + 4096 :])
            except BadImage:
                seen[kind] += 1
    assert seen["zeros"] == 100 and seen["noise"] >= 97, seen


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(CASES)), data=st.data())
def test_no_damage_makes_the_parsers_stumble(name: str, data: st.DataObject):
    content = bytearray(CASES[name].content[:3000])
    for _ in range(data.draw(st.integers(1, 6))):
        if content:
            at = data.draw(st.integers(0, min(len(content) - 1, 300)))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    for parse in (lambda: inspect(bytes(content)), lambda: inspect_header(bytes(content[:64]), len(content))):
        with contextlib.suppress(BadImage):
            parse()


def noisy_jpeg() -> bytes:
    """Return a JPEG of about 110 kB, the size of an ImageNet file."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((500, 375)).reduce(1)
    return encode(picture, "JPEG", quality=62)


def test_the_thorough_mode_is_fast(data: Path):
    """Measure processor time for files of ImageNet's size; the required rate is 1,500 a second on a core."""
    content = noisy_jpeg()
    assert 90_000 < len(content) < 130_000
    for i in range(300):
        (data / f"{i}.jpg").write_bytes(content)
    task = (str(data), [""] * 300, [f"{i}.jpg" for i in range(300)])
    start = time.process_time()
    entries, faults = inspect_files(task, mode="thorough", max_pixels=10**6)
    rate = 300 / (time.process_time() - start)
    assert not faults and (entries["width"] == 500).all() and rate > 1500, rate


def test_a_bomb_costs_nothing(data: Path):
    """A PNG of 196 megapixels and a JPEG that claims 4,290 are refused with little memory and time."""
    (data / "bomb.png").write_bytes(png_bomb(14000))
    (data / "claim.jpg").write_bytes(jpeg_frame(SOUND, height=65500, width=65500))
    (data / "fine.jpg").write_bytes(SOUND)
    with open(data / "huge.png", "wb") as file:
        file.write(png_header(64, 48))
        file.truncate(3 * 2**30)  # sparse
    code = f"""
import sys
from cjepa_fast.index import main
code = main([{str(data)!r}, "--processes", "1"])
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])  # kB; ru_maxrss counts the parent's too
sys.exit(code)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500 * 1024 and time.perf_counter() - start < 30
    assert "1 image in 1 folder, no labels; 3 left out (2 too many pixels, 1 too many bytes)" in done.stderr


def test_the_pixel_limit_is_a_setting(data: Path):
    (data / "a.jpg").write_bytes(jpeg(0, 100, 100))
    (data / "b.jpg").write_bytes(jpeg(0, 99, 101))
    manifest, rejected = build(data, max_pixels=9999)
    assert len(manifest) == 1 and [r.reason for r in rejected] == ["too many pixels"]
