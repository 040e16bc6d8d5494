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
LIBRARY = sorted(path for path in (ROOT / "cjepa_fast").rglob("*.py") if path.parent.name != "kernels")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
EVERYTHING = [*LIBRARY, *KERNELS, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]

# Rooms from the top: a room imports only from its own row and from rows below. Entry points are imported by nobody.
ENTRY_POINTS = ("train", "index")
ROWS = (
    ENTRY_POINTS,
    ("run",),
    ("engine",),
    ("evaluation", "methods"),
    ("feed", "networks", "losses"),
    ("masks", "ops", "native", "kernels"),
    ("config", "reference", "distributed", "errors", "philox", "cache"),
)
ROW = {room: index for index, row in enumerate(ROWS) for room in row}
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


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "cjepa_fast").with_suffix("").parts)


def room(path: Path) -> str:
    """The folder of cjepa_fast that holds a file, or the file's own name."""
    return path.relative_to(ROOT / "cjepa_fast").with_suffix("").parts[0]


def ours(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules of the library that one of its files imports: `{"feed.index", "errors"}`."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = (n for n in imports(path, package, at_import_only) if within(n, ("cjepa_fast",)))
    found = {n.removeprefix("cjepa_fast.") for n in names}
    modules = {name(other).removesuffix(".__init__") for other in LIBRARY} | {"kernels"}
    return {n for n in found if n in modules or within(n, ("kernels",))} - {name(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_run_down(path: Path) -> None:
    if path.parent.name == "cjepa_fast" and path.stem == "__init__":
        return
    rooms = {n.split(".")[0] for n in ours(path)} - {room(path)}
    assert not rooms & set(ENTRY_POINTS), "nobody imports an entry point"
    assert {r for r in rooms if ROW[r] < ROW[room(path)]} == set()


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in LIBRARY:
        if path.parent.name != "cjepa_fast" or path.stem != "__init__":
            graph.setdefault(room(path), set()).update({n.split(".")[0] for n in ours(path)} - {room(path)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_files_form_no_circle() -> None:
    graph = {name(path): ours(path, at_import_only=True) for path in LIBRARY if path.stem != "__init__"}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_only_ops_opens_the_kernels(path: Path) -> None:
    """`ops` is the one door to `kernels` and `native`, and imports kernels and triton only when it needs them."""
    if room(path) in ("ops", "native"):
        names = imports(path, "cjepa_fast.ops", at_import_only=True)
        behind: tuple[str, ...] = ("cjepa_fast.kernels", "triton")
    else:
        names, behind = imports(path, "cjepa_fast"), ("cjepa_fast.kernels", "cjepa_fast.native", "triton")
    assert [n for n in names if within(n, behind)] == []


@pytest.mark.parametrize("path", [p for p in LIBRARY if room(p) in ("networks", "losses", "masks", "ops")], ids=name)
def test_numbers_and_tensors_below_the_engine(path: Path) -> None:
    """These rooms take no configuration; the table of encoders is all that they read of `config`."""
    taken = {n for n in imports(path, "cjepa_fast") if within(n, ("cjepa_fast.config",))}
    table = ("ENCODERS", "VitShape", "encoder_shape")
    assert taken <= {"cjepa_fast.config", *(f"cjepa_fast.config.{n}" for n in table)}


def test_config_needs_the_standard_library_alone() -> None:
    for path in LIBRARY:
        if room(path) == "config":
            names = {n.split(".")[0] for n in imports(path, "cjepa_fast.config")}
            assert names <= {"cjepa_fast", "tyro", "yaml", *sys.stdlib_module_names}, path.name


def test_the_truth_imports_nothing_of_ours() -> None:
    assert ours(ROOT / "cjepa_fast" / "reference" / "method.py") == set()


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
    modules = [f"cjepa_fast.{name(path)}" for path in LIBRARY if path.stem != "__init__"]
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
