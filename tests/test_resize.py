"""Images resized to squares on a CPU: Pillow's bits from the library for any number of threads; torch is near."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cjepa_fast.native import host as native
from cjepa_fast.ops import resize_images


@pytest.fixture(params=["native", "torch"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "why_unavailable", lambda: "for a test")
    elif reason := native.why_unavailable():
        pytest.skip(f"no C++ library: {reason}")
    return request.param


def noise(n: int, low: int, high: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*rng.integers(low, high, 2), 3), dtype=np.uint8) for _ in range(n)]


def pillow(image: np.ndarray, size: int) -> np.ndarray:
    """Resize columns, then rows: two calls fix the order, which Pillow chooses in one call."""
    columns = Image.fromarray(image).resize((image.shape[1], size), Image.Resampling.BILINEAR)
    return np.asarray(columns.resize((size, size), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("low", "high"), [(1, 5), (18, 33), (20, 90), (200, 500)])
@pytest.mark.parametrize("size", [1, 24, 32, 224])
def test_pillow_resizes_the_same(impl: str, low: int, high: int, size: int):
    images = noise(20, low, high)
    found = resize_images(images, size)
    assert found.shape == (20, size, size, 3) and found.dtype == np.uint8
    difference = max(np.abs(f.astype(int) - pillow(image, size)).max() for f, image in zip(found, images, strict=True))
    assert difference <= (impl == "torch")


def test_log_gives_the_reason_for_the_fallback_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(native, "why_unavailable", lambda: "no compiler, for a test")
    caplog.set_level("INFO", logger="cjepa_fast")
    for _ in range(2):
        resize_images(noise(1, 20, 30), 8)
    assert [record.getMessage() for record in caplog.records] == ["resize: torch (no compiler, for a test)"]


def test_constant_images_and_images_of_the_size_stay_unchanged(impl: str):
    for value in (0, 255):
        assert (resize_images([np.full((37, 11, 3), value, dtype=np.uint8)], 50) == value).all()
    images = noise(3, 40, 41)
    assert np.array_equal(resize_images(images, 40), images)


def test_threads_do_not_change_a_bit(impl: str):
    images = noise(50, 10, 60)
    for threads in (2, 7, 90):
        assert np.array_equal(resize_images(images, 32, threads), resize_images(images, 32))
    assert resize_images([], 32, 2).shape == (0, 32, 32, 3)


def test_the_library_refuses_images_that_are_not_contiguous():
    if reason := native.why_unavailable():
        pytest.skip(f"no C++ library: {reason}")
    with pytest.raises(AssertionError, match="not C-contiguous"):
        resize_images([noise(1, 20, 21)[0][:, ::-1]], 8)
