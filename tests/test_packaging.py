"""The wheel holds the files of the checkout, and the kernels only as `cjepa_fast.kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(folder: Path, **environ: str) -> Path:
    """Build the wheel of the files that a commit would hold, in a copy, because building leaves folders behind."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "copy" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(folder / "copy")], check=True, env=os.environ | environ)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for source in (*ROOT.glob("csrc/*"), *ROOT.glob("kernels/*.py")):
            assert archive.read(f"cjepa_fast/{source.relative_to(ROOT)}") == source.read_bytes()
    assert {"cjepa_fast/train.py", "cjepa_fast/csrc/mask_sampler.cpp", "cjepa_fast/csrc/mask_spec.h"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cjepa_fast"}


def test_builds_without_compilers_and_libraries(tmp_path: Path) -> None:
    """An isolated build environment has setuptools alone, and the machine may have neither g++ nor nvcc."""
    for module in ("torch", "numpy", "triton"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('the build imports {module}')\n")
    missing = str(tmp_path / "no-compiler")
    wheel = build(tmp_path, CC=missing, CXX=missing, PYTHONPATH=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not any(name.endswith(".so") for name in names)
    assert {"cjepa_fast/csrc/mask_sampler.cpp", "cjepa_fast/csrc/mask_spec.h"} <= set(names)


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_import(wheel: Path, tmp_path: Path, where: str) -> None:
    path = ROOT
    if where == "wheel":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(path := tmp_path / "site")
    code = "import cjepa_fast.kernels.prediction_loss as k, cjepa_fast.train; print(k.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(path))
