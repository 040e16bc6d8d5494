"""Batches: the right images in the right order, with the right pixels; resources and how a run ends."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bad_images import png_header
from cjepa_fast.errors import UserError
from cjepa_fast.feed import decode
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import Visits, batch_ids
from cjepa_fast.feed.read import Reader
from cjepa_fast.feed.views import AUGMENTS, Photometric, Views, crop_windows, flip_flags
from pictures import (
    SCALE,
    assert_same,
    batches,
    center,
    fifty,
    images_by_step,
    opened,
    over_ranks,
    packed,
    picture,
    pillow_view,
)

pytestmark = pytest.mark.usefixtures("cache")
CHANGES = ("color", "lift", "sigma", "window", "unsolarized")  # what `Photometric.draw` may give


@pytest.fixture(scope="module")
def source(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return fifty(tmp_path_factory.mktemp("images"))


def test_class_folders_give_labels(source: Mixture):
    assert source.classes == ("even", "odd") and source.description == "50 images in 2 class folders"
    assert source.labels is not None and source.labels.dtype == np.int64 and len(source) == source.visits == 50
    for i in range(len(source)):
        assert source.classes[source.labels[i]] == Path(source.path(i)).parent.name
        with Image.open(source.path(i)) as image:
            assert (image.height, image.width) == tuple(source.sizes[i])


def test_names_with_spaces_and_unicode(tmp_path: Path):
    for name in ("кошка и кот", "犬 🐕"):
        (tmp_path / name).mkdir()
        picture(1, 20, 30).save(tmp_path / name / "é 100%.jpg")
    source = opened(tmp_path)
    assert set(source.classes) == {"кошка и кот", "犬 🐕"}
    batch = next(batches(source, batch_size=2, image_size=16))
    assert batch.images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>404</html>", "not an image"),
        (b"", "empty"),
        (b"\xff\xd8\xff\xe0\x00", "truncated"),
        (png_header(20000, 9000), "too many pixels"),
    ],
)
def test_a_bad_file_is_left_out_and_an_error_only_if_nothing_is_usable(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(
        UserError, match=r"holds no usable image: .*bad\.jpg: .*; remove or replace what is bad"
    ) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    for i in range(2):
        picture(i, 30, 30).save(tmp_path / f"{i}.jpg")
    source = opened(tmp_path)
    assert source.description == f"2 images in 1 folder, no labels; 1 left out (1 {reason})"
    assert [sorted(ids) for ids, _ in images_by_step(source, batch_size=2, last_step=2).values()] == [[0, 1]] * 2


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_every_kind_of_source_shows_the_same(source: Mixture, tmp_path: Path, kind: str):
    other = opened(packed(source, tmp_path, kind))
    assert other.labels is None
    assert_same(images_by_step(source), images_by_step(other, threads=3))
    some = np.array([3, 49, 0])
    (view,), (again,) = (center(s, some, 24, 3) for s in (source, other))
    assert torch.equal(view, again)


@pytest.mark.parametrize("size", [24, 64])  # some grow, some shrink
def test_batches_agree_with_pillow(source: Mixture, size: int):
    seen = 0
    for batch in batches(source, first_step=2, last_step=5, image_size=size, threads=3):  # one of epoch 0, two of 1
        ids = batch.ids.numpy()
        epoch, due, _ = batch_ids(source, seed=3, step=batch.step, batch_size=16)
        assert batch.epoch == epoch == batch.step // 3 and np.array_equal(ids, due)
        visits = Visits(ids, 3, batch.epoch)
        windows, flips = crop_windows(visits, source.sizes[ids], SCALE), flip_flags(visits)
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (16, size, size, 3)
        assert batch.wait_ms > 0
        for image, i, window, flip in zip(batch.images.numpy(), ids, windows, flips, strict=True):
            expected = pillow_view(source.path(i), window, size)
            difference = np.abs(image.astype(int) - (expected[:, ::-1] if flip else expected))
            # Measured: mean up to 0.24, at most 4 of 255 levels, from rounding in the two resamplers.
            assert difference.mean() < 0.5 and difference.max() <= 6
            seen += 1
    assert seen == 48


ODD_FILES = {
    **{f"exif{o}.jpg": ("RGB", {"exif": o}) for o in range(1, 9)},
    "exif6.png": ("RGB", {"exif": 6}),
    "exif6.webp": ("RGB", {"exif": 6}),
    "exif6.tif": ("RGB", {"exif": 6}),
    "gray.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "png_named.jpg": ("RGB", {"format": "PNG"}),
    "palette_alpha.png": ("P", {"transparency": 3}),
    "rgba.png": ("RGBA", {}),
    "gray_alpha.png": ("LA", {}),
    "gray.webp": ("L", {"lossless": True}),
    "a.bmp": ("RGB", {}),
    "a.ppm": ("RGB", {}),
    "gray.pgm": ("L", {}),
    "lzw.tiff": ("RGB", {"compression": "tiff_lzw"}),
}


def test_odd_files_come_out_upright_and_rgb(tmp_path: Path):
    """Windows of nearly the whole image, whose sides are as 3 to 4: a size that DALI does not see shows garbage."""
    for name, (mode, options) in ODD_FILES.items():
        options = dict(options)
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options["exif"] = exif
        picture(7, 48, 64).convert(mode).save(tmp_path / name, **options)
    source = opened(tmp_path)
    whole = {"crop_scale": (1.0, 1.0), "hflip": False}
    for batch in batches(source, batch_size=len(source), image_size=32, last_step=2, **whole):
        ids = batch.ids.numpy()
        windows = crop_windows(Visits(ids, 3, batch.epoch), source.sizes[ids], (1.0, 1.0))
        assert (windows[:, 2:] >= source.sizes[ids] - 1).all()
        for image, i, window in zip(batch.images.numpy(), ids, windows, strict=True):
            turned = ODD_FILES[Path(source.path(i)).name][1].get("exif", 1) >= 5
            assert tuple(source.sizes[i]) == ((64, 48) if turned else (48, 64)), source.name(i)
            difference = np.abs(image.astype(int) - pillow_view(source.path(i), window, 32))
            assert difference.mean() < 0.5 and difference.max() <= 6, source.name(i)


@pytest.mark.parametrize("image_size", [24, 56])
def test_center_batches_agree_with_pillow(source: Mixture, image_size: int):
    """Test both sides of the rule: images of 20 to 90 pixels, views of 24 and 56."""
    ids = np.arange(len(source))[::-1]
    views = center(source, ids, image_size, 16)
    assert [len(view) for view in views] == [16, 16, 16, 2]
    for image, i in zip(torch.cat(views).numpy(), ids, strict=True):
        with Image.open(source.path(i)) as original:
            short = min(original.size)
            target = image_size if short <= image_size else image_size * 256 // 224
            width, height = (int(target * side / short) for side in original.size)
            resized = original.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        expected = np.asarray(resized.crop((left, top, left + image_size, top + image_size)))
        difference = np.abs(image.astype(int) - expected)
        assert difference.mean() < 0.5 and difference.max() <= 6, (source.name(i), original.size)


def test_center_leaves_images_of_the_right_size_alone(tmp_path: Path):
    picture(0, 32, 32).save(tmp_path / "a.png")
    (view,) = center(opened(tmp_path), np.array([0, 0]), 32, 4)
    assert (view.numpy() == np.asarray(picture(0, 32, 32))).all()


@pytest.mark.parametrize("changes", [{"threads": 2}, {"prefetch": 1}, {"prefetch": 4, "threads": 2}])
def test_runtime_settings_do_not_change_the_data(source: Mixture, changes: dict):
    """Compare bit for bit. Batches are kept while later ones are made, so a reused buffer shows too."""
    assert_same(images_by_step(source), images_by_step(source, **changes))


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_world_size_does_not_change_the_data(source: Mixture, world_size: int):
    assert_same(images_by_step(source), over_ranks(source, world_size))


@pytest.fixture(scope="module")
def mixture(source: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Return 50 images of a folder, each twice, and a changing half of 50 in shards: 125 visits an epoch."""
    shards = packed(source, tmp_path_factory.mktemp("shards"), "tar")
    return opened(f"{Path(source.path(0)).parents[1]}=2", f"{shards}=0.5")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"world_size": 4},
        {"world_size": 2, "threads": 3, "prefetch": 4},
        {"prefetch": 1},
        {"first_step": 5},
        {"first_step": 11, "world_size": 2, "threads": 2},
    ],
    ids=str,
)
def test_a_mixture_is_the_same_however_it_is_made(mixture: Mixture, changes: dict):
    """Vary ranks, threads, prefetch and a restart in the middle of an epoch (of 7 steps)."""
    whole = images_by_step(mixture, last_step=16)
    kept = {step: batch for step, batch in whole.items() if step >= changes.get("first_step", 0)}
    assert_same(kept, over_ranks(mixture, **{"world_size": 1, "last_step": 16} | changes))


def test_each_epoch_of_a_mixture_has_its_weights(mixture: Mixture):
    assert mixture.visits == 125
    steps = images_by_step(mixture, batch_size=25, image_size=8, last_step=10)
    epochs = [[i for step in range(5 * e, 5 * e + 5) for i in steps[step][0]] for e in range(2)]
    for ids in epochs:
        counts = np.bincount(ids, minlength=100)
        assert (counts[:50] == 2).all() and counts[50:].sum() == 25 and counts.max() == 2
    assert sorted(i for ids in epochs for i in ids if i >= 50) == list(range(50, 100))
    twice = [image for step in range(5) for i, image in zip(*steps[step], strict=True) if i == 7]
    assert len(twice) == 2 and not torch.equal(*twice)


def test_resume_equals_going_on(source: Mixture):
    whole = images_by_step(source)
    assert list(whole) == list(range(7))
    assert_same({step: whole[step] for step in (4, 5, 6)}, images_by_step(source, first_step=4))
    assert images_by_step(source, first_step=7) == {}


def test_each_epoch_shows_every_image_once(source: Mixture):
    ids = [i for step_ids, _ in images_by_step(source, batch_size=10, last_step=10).values() for i in step_ids]
    assert sorted(ids[:50]) == sorted(ids[50:]) == list(range(50)) and ids[:50] != ids[50:]


def test_images_outlive_close_and_close_ends_the_iterator(source: Mixture):
    loader = batches(source, last_step=None)
    images = next(loader).images
    copy = images.clone()
    loader.close()
    assert list(loader) == []
    list(batches(source))  # overwrites whatever was given back to the allocator
    assert torch.equal(images, copy)


EVERYTHING = AUGMENTS["byol"]
TWO = {"photometric": EVERYTHING, "views": 2}


def views_by_step(source: Mixture, **changes) -> dict[int, tuple[list[int], torch.Tensor]]:
    """Return batches with the image first, the view second."""
    return {step: (ids, images.transpose(0, 1)) for step, (ids, images) in images_by_step(source, **changes).items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"world_size": 2, "threads": 3, "prefetch": 4}, {"world_size": 4, "first_step": 11}, {"prefetch": 1}],
    ids=str,
)
@pytest.mark.parametrize("independent", [False, True])
def test_views_are_the_same_however_they_are_made(mixture: Mixture, changes: dict, independent: bool):
    options = {"last_step": 14, "independent": independent, **TWO}
    whole = views_by_step(mixture, **options)
    kept = {step: batch for step, batch in whole.items() if step >= changes.get("first_step", 0)}
    world_size = changes.get("world_size", 1)
    ranks = [views_by_step(mixture, rank=r, **options | {"world_size": 1} | changes) for r in range(world_size)]
    assert_same(kept, {s: ([i for r in ranks for i in r[s][0]], torch.cat([r[s][1] for r in ranks])) for s in kept})


def test_two_views_share_the_crop_and_are_decoded_once(source: Mixture, monkeypatch: pytest.MonkeyPatch):
    single = images_by_step(source)
    calls = []
    decoders = importlib.import_module("nvidia.dali.fn").decoders
    for name in ("image", "image_slice"):
        decode = getattr(decoders, name)
        monkeypatch.setattr(decoders, name, lambda *a, n=name, f=decode, **k: calls.append(n) or f(*a, **k))
    plain = images_by_step(source, views=2)
    assert calls == ["image_slice"]  # which decodes the window alone, where the format can
    for step, (ids, images) in single.items():
        assert plain[step][0] == ids and plain[step][1].shape == (2, 16, 24, 24, 3)
        assert torch.equal(plain[step][1][0], images) and torch.equal(plain[step][1][1], images)


def test_views_have_independent_colours_and_shares_of_their_own(source: Mixture):
    plain = images_by_step(source, last_step=3)
    both = images_by_step(source, last_step=3, **TWO)
    first = images_by_step(source, last_step=3, photometric=EVERYTHING)
    assert_same(first, {step: (ids, images[0]) for step, (ids, images) in both.items()})
    images = torch.cat([views for _, views in both.values()], dim=1)
    assert (images[0] != images[1]).flatten(1).any(1).float().mean() > 0.9
    half = {"photometric": Photometric(solarize_p=(0.0, 1.0)), "views": 2}
    for step, (_, views) in images_by_step(source, last_step=3, **half).items():
        before = plain[step][1]
        assert torch.equal(views[0], before) and torch.equal(views[1], torch.minimum(before, 255 - before))


def test_independent_crops(source: Mixture):
    """View 0 is the single view bit for bit. Every view has the window and flip drawn for it, by Pillow's pixels."""
    single = images_by_step(source, last_step=2)
    for batch in batches(source, last_step=2, views=3, independent=True):
        ids = batch.ids.numpy()
        visits = Visits(ids, 3, epoch=0)
        assert torch.equal(batch.images[0], single[batch.step][1])
        for view in range(3):
            windows, flips = crop_windows(visits, source.sizes[ids], SCALE, view), flip_flags(visits, view)
            for image, i, window, flip in zip(batch.images[view].numpy(), ids, windows, flips, strict=True):
                expected = pillow_view(source.path(i), window, 24)
                difference = np.abs(image.astype(int) - (expected[:, ::-1] if flip else expected))
                assert difference.mean() < 0.5 and difference.max() <= 6


@pytest.mark.parametrize(
    ("operators", "wanted"),
    [
        (["coord_transform", "color_space_conversion", "cast"], {"photometric": Photometric(grayscale_p=0.1)}),
        (["gaussian_blur"], {"photometric": Photometric(blur_p=(0.1,))}),
        (["flip"], {"hflip": True}),
        (["stack"], {"views": 2}),
        (["slice"], {"views": 2, "independent": True}),
    ],
)
def test_an_operator_is_there_only_if_asked_for(
    source: Mixture, monkeypatch: pytest.MonkeyPatch, operators: list[str], wanted: dict
):
    fn = importlib.import_module("nvidia.dali.fn")
    called = []
    for name in operators:
        operator = getattr(fn, name)
        monkeypatch.setattr(fn, name, lambda *a, n=name, f=operator, **k: called.append(n) or f(*a, **k))
    options = {"hflip": False, "last_step": 1}
    list(batches(source, **options))
    assert not called
    list(batches(source, **options | {"photometric": Photometric(color_jitter_p=1.0)}))  # of no strength
    assert not called
    list(batches(source, **options | wanted))
    assert set(called) == set(operators)


def test_nothing_is_copied_on_the_way_to_torch(source: Mixture, monkeypatch: pytest.MonkeyPatch):
    pointers = []
    from_dlpack = torch.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda x: pointers.append(x.data_ptr()) or from_dlpack(x))
    for options in ({}, TWO):
        loader = batches(source, last_step=2, **options)
        assert [batch.images.data_ptr() for batch in loader] == pointers
        pointers.clear()


def test_the_next_batch_is_made_while_the_caller_computes(source: Mixture, monkeypatch: pytest.MonkeyPatch):
    given = []
    get = Reader.get
    monkeypatch.setattr(Reader, "get", lambda reader: given.append(time.monotonic()) or get(reader))
    for prefetch in (1, 2, 3):
        given.clear()
        loader = batches(source, prefetch=prefetch)
        next(loader)
        end = time.monotonic() + 10
        while len(given) < prefetch and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(given) == prefetch
        loader.close()


def _resources() -> tuple[int, int, int]:
    """Return memory in bytes, open files and threads of this process."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_two_thousand_batches_leak_nothing(mixture: Mixture):
    """Run two dozen pipelines over a folder and shards, half of them with two changed views."""
    for options in ({}, TWO):
        list(batches(mixture, last_step=3, **options))
    gc.collect()
    before = _resources()
    marks = []
    for start in range(0, 2400, 100):
        options = {**TWO, "image_size": 16} if start % 200 else {"image_size": 64}
        for batch in batches(mixture, batch_size=4, first_step=start, last_step=start + 100, threads=2, **options):
            if batch.step % 400 == 350:
                marks.append(_resources())
    gc.collect()
    after = _resources()
    assert marks[-1][0] - marks[0][0] < 4e6, marks  # half of 2,000 batches have 49 kB, half 6 kB
    files = [files for _, files, _ in marks]
    assert max(files) - min(files) <= 2 and after[1] <= before[1] + 2  # two readers may be in a file, shards stay open
    threads = [threads for _, _, threads in marks]
    assert max(threads) - min(threads) <= 1 and after[2] == before[2]  # a resize in two threads may be at work


def test_a_caller_that_is_busy_is_not_run_ahead_of(source: Mixture, monkeypatch: pytest.MonkeyPatch):
    """Batches read ahead are bounded in number, wait for the caller, and are at hand when the caller returns."""
    read, taken = Mixture.read_many, []
    monkeypatch.setattr(Mixture, "read_many", lambda self, ids: taken.extend(ids) or read(self, ids))
    for prefetch in (1, 3):
        taken.clear()
        loader = batches(source, last_step=None, prefetch=prefetch, batch_size=4, threads=2)
        next(loader)
        time.sleep(0.5)
        ahead = len(taken)
        time.sleep(0.3)
        # batches: one handed over, `prefetch` in the pipeline, as many in the queue, one that waits for room in it
        assert ahead == len(taken) and ahead <= 4 * (2 + 2 * prefetch)
        assert prefetch == 1 or next(loader).wait_ms < 20
        loader.close()


@pytest.mark.parametrize("size", [24, 64])
def test_closing_ends_every_thread(source: Mixture, size: int):
    list(batches(source, last_step=1))
    before = _resources()[2]
    loaders = [batches(source, last_step=None, threads=3, image_size=size) for _ in range(4)]
    for loader in loaders:
        next(loader)
    assert _resources()[2] > before + 20
    loaders[0].close()
    del loaders, loader  # the others are just dropped
    gc.collect()
    assert _resources()[2] == before


def test_missing_dali_is_named(source: Mixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="nvidia-dali-cuda130"):
        batches(source)


def test_import_needs_neither_dali_nor_pillow():
    code = "import sys; sys.modules.update({'nvidia': None, 'PIL': None}); import cjepa_fast.feed.batches"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("crops", [1, 2])
def test_the_graph_for_a_gpu_decodes_whole_images(monkeypatch: pytest.MonkeyPatch, crops: int):
    """The GPU cuts windows from an image decoded once. Tests the graph alone, which needs no GPU."""
    fn = importlib.import_module("nvidia.dali.fn")
    calls, decode_whole = [], fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", lambda *a, **k: calls.append(k) or decode_whole(*a, **k))
    monkeypatch.setattr(fn.decoders, "image_slice", None)
    names = [f"{name} {v}" for v in range(crops) for name in ("anchor", "shape", "flip", *CHANGES)]
    with importlib.import_module("nvidia.dali.pipeline").Pipeline(batch_size=2, num_threads=1, device_id=0):
        files, *inputs = fn.external_source(source=lambda: [], num_outputs=1 + len(names))
        given = dict(zip(names, inputs, strict=True))
        found = decode._cropped(files, given, Views(24, crops, independent=True), Place(device="cuda:0"))
        found = [decode._changed(images, given, v, "cuda:0") for v, images in enumerate(found)]
    assert [images.device for images in found] == ["gpu"] * crops
    assert calls == [{"device": "mixed", "hw_decoder_load": 0.65, "jpeg_fancy_upsampling": True}]


@pytest.mark.gpu
@pytest.mark.parametrize("load", [0.0, 1.0])
def test_gpu_decodes_as_the_cpu(source: Mixture, monkeypatch: pytest.MonkeyPatch, load: float):
    """CUDA and the hardware engine differ by 2 levels at most, 0.2 on average, per image. Not yet run on a GPU."""
    monkeypatch.setattr(decode, "HW_DECODER_LOAD", load)
    for cpu, gpu in zip(batches(source), batches(source, device="cuda:0"), strict=True):
        assert gpu.images.is_cuda and torch.equal(cpu.ids, gpu.ids)
        difference = (cpu.images.int() - gpu.images.cpu().int()).abs()
        assert difference.max() <= 2 and difference.float().mean(dim=(1, 2, 3)).max() <= 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("independent", [False, True])
def test_gpu_changes_views_as_the_cpu(tmp_path: Path, independent: bool):
    """Use lossless images, which decode alike everywhere. Not yet run on a GPU."""
    for i in range(32):
        picture(i, 64, 64).save(tmp_path / f"{i}.png")
    source = opened(tmp_path)
    options = {"independent": independent, "last_step": 2, **TWO}
    for cpu, gpu in zip(batches(source, **options), batches(source, device="cuda:0", **options), strict=True):
        difference = (cpu.images.int() - gpu.images.cpu().int()).abs()
        assert difference.max() <= 4 and difference.float().mean() <= 0.2  # a level of the resize, times 1.4 x 1.4


@pytest.mark.gpu
def test_the_callers_stream_waits_for_the_images_and_keeps_them(source: Mixture):
    """Read images on a busy stream and drop them before the GPU reaches them. Not yet run on a GPU."""
    expected = [batch.images.long().sum() for batch in batches(source, device="cuda:0", last_step=30)]
    torch.cuda.synchronize()
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in batches(source, device="cuda:0", last_step=30):
            torch.cuda._sleep(20_000_000)
            found.append(batch.images.long().sum())
            del batch
    torch.cuda.synchronize()
    assert torch.equal(torch.stack(found), torch.stack(expected))
