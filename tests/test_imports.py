"""Who may import whom, and what an import may need and cost."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "cjepa_fast").glob("*.py"))
DOOR = sorted((ROOT / "cjepa_fast" / "ops").glob("*.py"))  # may name the kernels, the extension and triton
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
EVERYTHING = [*LIBRARY, *DOOR, *KERNELS, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]

# arrows point down only; a module that is not listed stands beside the rows
ROWS = {
    "train": 4,
    "step": 3, "graphs": 3, "checkpoint": 3, "data": 3,
    "vit": 2, "losses": 2, "masks": 2, "optim": 2,
    "native": 0, "native_cuda": 0, "reference": 0, "reference_masks": 0,
}  # fmt: skip
OPTIONAL = ("triton", "nvidia.dali", "timm", "transformers", "torchvision", "tyro", "yaml", "PIL")


def imports(path: Path, package: str, at_import_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file of `package` imports anywhere, and of what it takes from them."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_siblings_only(path: Path) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # a package of that name would shadow somebody else's
    allowed = ("torch", "triton", "siblings", *sys.stdlib_module_names)
    assert [name for name in imports(path, "siblings") if not within(name, allowed)] == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_library_reaches_kernels_through_the_door_only(path: Path) -> None:
    behind = ("cjepa_fast.kernels", "cjepa_fast.native", "cjepa_fast.native_cuda", "triton")
    if path.stem == "native_cuda":  # builds as `native` builds
        behind = ("cjepa_fast.kernels", "triton")
    assert [name for name in imports(path, "cjepa_fast") if within(name, behind)] == []


@pytest.mark.parametrize("path", DOOR, ids=lambda path: path.stem)
def test_the_door_leads_down_only(path: Path) -> None:
    """Its files import each other, errors, the truth and what lies behind; kernels and triton when they are needed."""
    allowed = ("ops", "errors", "distributed", "reference", "reference_masks", "native", "native_cuda", "kernels")
    names = [name for name in imports(path, "cjepa_fast.ops") if within(name, ("cjepa_fast",))]
    assert [n for n in names if n != "cjepa_fast" and not within(n.removeprefix("cjepa_fast."), allowed)] == []
    behind = ("cjepa_fast.kernels", "triton")
    assert [name for name in imports(path, "cjepa_fast.ops", at_import_only=True) if within(name, behind)] == []


def ours(path: Path, at_import_only: bool = False) -> set[str]:
    """The modules of the library that one of its files imports."""
    names = imports(path, "cjepa_fast", at_import_only)
    return {name.split(".")[1] for name in names if name.startswith("cjepa_fast.")} & {p.stem for p in LIBRARY}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_arrows_point_down(path: Path) -> None:
    names, own = ours(path), ROWS.get(path.stem)
    assert "train" not in names, "nobody imports an entry point"
    if own is not None:
        assert {name for name in names if ROWS.get(name, 0) > own} == set()
        assert own >= 3 or "config" not in names, "below step.py: numbers and tensors, no configuration"


def test_no_import_cycle() -> None:
    graph = {path.stem: ours(path, at_import_only=True) for path in LIBRARY}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_the_truth_imports_nothing_of_ours() -> None:
    assert ours(ROOT / "cjepa_fast" / "reference.py") == set()


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nobody_imports_a_top_level_kernels(path: Path) -> None:
    """It would be a second copy of the kernels, or another project's package of that name."""
    assert [name for name in imports(path, "neutral") if within(name, ("kernels",))] == []


def test_tests_never_import_bench() -> None:
    """Timings take their truth from tests, so none flows back; bench's own tests import what they test."""
    for path in {*(ROOT / "tests").glob("*.py")} - {*(ROOT / "tests").glob("test_bench*.py")}:
        assert not [name for name in imports(path, "tests") if within(name, ("bench",))], path.name


def python(code: str) -> str:
    """Runs code in a fresh interpreter in the bare checkout and returns what it prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernels_are_importable_from_the_bare_checkout() -> None:
    pytest.importorskip("triton")
    names = [path.stem for path in KERNELS]
    printed = python(
        f"import importlib; [importlib.import_module(f'cjepa_fast.kernels.{{name}}') for name in {names}]\n"
        "import sys; print('kernels' in sys.modules)"
    )
    assert names and printed.strip() == "False"


def test_library_imports_without_anything_optional_and_fast() -> None:
    """Time of the processor beyond torch's own import, as the machine may be busy with other things."""
    modules = ["cjepa_fast.ops", *(f"cjepa_fast.{path.stem}" for path in LIBRARY if not path.stem.startswith("__"))]
    seconds = python(f"""
import importlib, importlib.abc, sys, time

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {OPTIONAL}):
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
import torch
start = time.process_time()
for name in {modules}:
    importlib.import_module(name)
print(time.process_time() - start)
""")
    assert float(seconds) < 2.0
