"""What holds for every test: the kernels' execution mode, one thread, poisoned memory, and tests that need a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Interpreted kernels multiply with NumPy. OpenBLAS picks its kernels by the CPU, and those for AVX-512 err up to four
# times as much as those for AVX2 in small products, which would blur what the oracle sees. Read when NumPy loads.
assert "numpy" not in sys.modules, "NumPy was loaded before tests/conftest.py"
if (cpu := Path("/proc/cpuinfo")).exists() and " avx2 " in cpu.read_text():
    os.environ["OPENBLAS_CORETYPE"] = "Haswell"

import torch  # noqa: E402

# Triton decides when a kernel is defined whether it is compiled or interpreted, so this precedes any kernel import
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # the tensors are tiny; more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 20 images each, cat and dog."""
    from runs import write_images  # which loads the kernels

    return write_images(tmp_path_factory.mktemp("data"), 20, ("cat", "dog"))


@pytest.fixture
def data(cache: None, tmp_path: Path) -> Path:
    """A folder for images, which the cache is not in."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills floating memory from torch.empty, empty_like and new_empty with NaN: an unwritten element shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            memory = allocate(*args, **kwargs)
            if memory.is_floating_point():
                with torch.no_grad():
                    memory.fill_(float("nan"))
            return memory

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
