"""The build, the cache and the loading of the C++ library, and the fallback without a compiler."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cjepa_fast.errors import UserError
from cjepa_fast.native import build
from cjepa_fast.native import host as native
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskSpec, Mode
from masking import assert_equal, make

ROOT = Path(__file__).resolve().parent.parent
RELEASE = (*build.HOST_FLAGS, "-DCJEPA_CLONES=")
SPEC = MaskSpec(1, 2, Mode.FIXED, 14, 14, 4, 6, 6, 13, 13, 10, 45)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a package folder with sources but no library and an empty cache, and forget the loaded library."""
    folder = tmp_path / "package"
    shutil.copytree(build.PACKAGE / "csrc", folder / "csrc")
    monkeypatch.setattr(build, "PACKAGE", folder)
    monkeypatch.setattr(build, "HOST_FLAGS", (*RELEASE, "-O0"))  # compiles in a fraction of the time
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    native.LIBRARY.found.cache_clear()
    yield folder
    native.LIBRARY.found.cache_clear()


@pytest.fixture
def compiler(package: Path) -> None:
    try:
        native.compiler()
    except build.Unavailable as reason:
        pytest.skip(f"nothing to build with: {reason}")


def reload() -> str | None:
    native.LIBRARY.found.cache_clear()
    return native.why_unavailable()


def expected_hash() -> str:
    return build.source_hash("cpp", build.HOST_FLAGS)


def compiled(path: Path) -> Path:
    """Compile the library to `path`."""
    define, files = f'-DCJEPA_SOURCE_HASH="{expected_hash()}"', map(str, build.sources("cpp"))
    build.run([*native.compiler(), *build.HOST_FLAGS, "-shared", define, *files, "-o", str(path)])
    return path


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.so"))


def test_builds_once_into_the_cache(
    package: Path, compiler: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, build.__name__)
    assert reload() is None
    (library,) = cached(tmp_path)
    assert library.name.startswith(f"native-{expected_hash()}-") and len(caplog.records) == 1
    before = library.stat().st_mtime_ns
    assert reload() is None
    assert library.stat().st_mtime_ns == before and len(caplog.records) == 1
    assert native.sample_masks(SPEC, np.arange(3))[0].shape == (3, 45)


def test_two_processes_may_build_at_once(package: Path, compiler: None, tmp_path: Path) -> None:
    code = (
        "import logging, sys; from pathlib import Path; from cjepa_fast.native import build, host; "
        "logging.basicConfig(level='INFO', format='%(message)s'); "
        f"build.PACKAGE = Path({str(package)!r}); sys.exit(host.why_unavailable())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = sorted(run.communicate()[1] for run in runs)
    assert [run.returncode for run in runs] == [0, 0], said
    assert said[0] == "" and said[1].startswith("compiled csrc") and said[1].count("\n") == 1  # the other one waited
    assert len(cached(tmp_path)) == 1


def test_without_a_compiler_numpy_serves_and_says_so(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(RuntimeWarning, match=r"20 times slower.*no C\+\+ compiler"):
        sampler = make(seed=3)
    assert sampler.impl == "numpy"
    with warnings.catch_warnings():  # no warning if NumPy was asked for
        warnings.simplefilter("error")
        asked = make(seed=3, impl="numpy")
    assert torch.equal(sampler.sample(0, range(4)).context, asked.sample(0, range(4)).context)
    with pytest.raises(UserError, match=r"impl: native is not available \(no C\+\+ compiler"):
        make(impl="native")


def test_a_failing_compiler_is_named(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(reload())
    (package / "csrc" / "mask_sampler.cpp").write_text("#error not today\n")
    monkeypatch.delenv("CXX")
    if shutil.which("g++"):
        assert "not today" in str(reload())
        assert cached(tmp_path) == []


def test_an_unwritable_cache_is_named(package: Path, compiler: None, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert str(tmp_path / "cache") in str(reload())


@pytest.mark.parametrize("changed", ["mask_sampler.cpp", "mask_spec.h"])
def test_a_prebuilt_library_is_used_unless_stale(
    package: Path, compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    compiled(package / "_native.test.so")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert reload() is None
    assert not (tmp_path / "cache").exists()
    with (package / "csrc" / changed).open("a") as source:
        source.write("// changed\n")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert "no C++ compiler" in str(reload())
    assert reload() is None
    assert len(cached(tmp_path)) == 1


def test_a_broken_file_in_the_cache_is_replaced(package: Path, compiler: None, tmp_path: Path) -> None:
    library = tmp_path / "cache" / f"native-{expected_hash()}-{sys.platform}-{platform.machine()}.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF")
    assert reload() is None
    assert cached(tmp_path) == [library] and library.stat().st_size > 10_000


def test_the_code_for_any_cpu_gives_the_same_masks(
    package: Path, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library holds loops for several levels of x86-64; other machines and compilers have the plain loops."""
    monkeypatch.setattr(build, "HOST_FLAGS", RELEASE)
    assert reload() is None
    ids = np.arange(100)
    for spec in (
        SPEC,
        SPEC._replace(mode=Mode.FAITHFUL, union_cap=9000),
        SPEC._replace(mode=Mode.PACKED, cap=9000, union_cap=9000),
        MaskSpec(1, 2, Mode.RANDOM, 14, 14, 1, 1, 118, 14, 14, 10, 78, union_cap=12000),
    ):
        ours = native.sample_masks(spec, ids, inverse=True, union=True)
        assert_equal(ours, reference_masks.sample(spec, ids, inverse=True, union=True))


def test_setup_builds_the_same_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(f"nothing to build with: {reason}")
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (library,) = (tmp_path / "lib" / "cjepa_fast").glob("_native*.so")
    assert build.open_library(library, native.FUNCTIONS, expected_hash()) is not None
