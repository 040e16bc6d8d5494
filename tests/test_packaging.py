"""The wheel holds what the checkout holds, and `kernels` is ours only as `cjepa_fast.kernels`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    # from a copy: setuptools leaves build folders behind
    subprocess.run(["git", "clone", "-q", str(ROOT), str(out / "copy")], check=True)
    subprocess.run([*build, str(out / "copy")], check=True)
    return next(out.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert (
            archive.read("cjepa_fast/kernels/prediction_loss.py") == (ROOT / "kernels/prediction_loss.py").read_bytes()
        )
    assert {"cjepa_fast/train.py", "cjepa_fast/csrc/mask_sampler.cpp"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cjepa_fast"}


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
