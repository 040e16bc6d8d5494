"""Compiles every shipped kernel ahead of time, without a GPU, and prints the compiler's figures.

    python -m bench.compile_report [--arch 80 90 100] [--only NAME] [--jobs N] [--json FILE]

Exit code 1 if a tile fails to compile, spills registers to memory, needs more shared memory than a block can have, or
multiplies 16-bit matrices without tensor-core instructions. A Triton module takes part by listing its tiles as `AOT`:
dicts of name, kernel, signature (argument to Triton type, ":16" appended for multiples of 16) and constants
(compile-time arguments and launch options such as num_warps and num_stages). csrc/*.cu go through nvcc if it is there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import cjepa_fast.kernels
from cjepa_fast.native.cuda import FLAGS

# most shared memory that one block can have, KiB (CUDA C++ Programming Guide, table "Technical Specifications")
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
INSTRUCTIONS = {"wgmma": r"\bwgmma\.mma_async\.\S+", "mma.sync": r"\bmma\.sync\.\S+", "tcgen05": r"\btcgen05\.mma\.\S+"}
CUDA_SOURCES = sorted(Path(__file__).parents[1].glob("csrc/**/*.cu"))


class Usage(NamedTuple):
    """Resources of one tile on one architecture."""

    registers: int  # per thread
    shared: int  # bytes per block
    spills: int  # bytes per thread, stores and loads
    stages: int | None = None  # of the software pipeline
    matrix: str = "none"  # tensor-core instruction
    multiplies_16bit: bool = False  # a matrix product in a kernel that reads bf16 or fp16


class Tile(NamedTuple):
    """A tile to compile; `entry` is a dict of `AOT`, or the path of a CUDA source."""

    module: str
    name: str
    entry: dict[str, Any] | Path
    arch: int


def compile_tile(tile: dict[str, Any], arch: int) -> Usage:
    """Compile one entry of `AOT` for compute capability `arch` (90 for Hopper). Raises Triton's errors."""
    kernel, constants = tile["kernel"], dict(tile["constants"])
    options = {name: constants.pop(name) for name in list(constants) if name not in kernel.arg_names}
    given = {**tile["signature"], **dict.fromkeys(constants, "constexpr")}
    assert set(given) == set(kernel.arg_names), set(given) ^ set(kernel.arg_names)
    signature = {name: given[name].removesuffix(":16") for name in kernel.arg_names}
    multiples = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                 for name, kind in given.items() if kind.endswith(":16")}  # fmt: skip
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # Triton reads registers and spills from the driver, which may be missing; ptxas prints them
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(path), "-o", f"{path}.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    assert registers is not None and spills, said
    return Usage(
        registers=int(registers[1]),
        shared=compiled.metadata.shared,
        spills=sum(map(int, spills)),
        stages=compiled.metadata.num_stages,
        matrix=matrix_instruction(ptx),
        # called functions are inlined by now, and branches on constants gone
        multiplies_16bit="tt.dot" in compiled.asm["ttir"]
        and any(kind.startswith(("*bf16", "*fp16")) for kind in signature.values()),
    )


def matrix_instruction(ptx: str) -> str:
    """Return tensor-core instruction and operand types of a PTX text, such as "wgmma bf16"; "none" if there is none."""
    found = set()
    for name, pattern in INSTRUCTIONS.items():
        for instruction in re.findall(pattern, ptx):
            operand = re.findall(r"\.(?:kind::)?(bf16|f16|tf32|f8f6f4|e4m3|e5m2|s8)\b", instruction)
            found.add(f"{name} {operand[-1] if operand else '?'}")
    return ", ".join(sorted(found)) or "none"


def compile_cuda(path: Path, arch: int) -> list[tuple[str, Usage]]:
    """Return names and usage of the kernels of a CUDA source. Raises RuntimeError with nvcc's first line."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, '-DCJEPA_SOURCE_HASH="none"', target, "-Xptxas=-v", "-cubin", str(path)]
        command += ["-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"nvcc: exit status {done.returncode}").splitlines()[0])
    kernels = []
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = function_name(part.split("'")[1])
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert registers is not None, part
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        kernels.append((name, Usage(int(registers[1]), int(shared[1]) if shared else 0, spills)))
    return kernels


def function_name(symbol: str) -> str:
    """Return the function's name in a C++ symbol, such as "sample" of _ZN5cjepa6sampleEPi."""
    names, rest = [], re.sub("^_ZN?", "", symbol)
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:]
    return names[-1] if names else symbol


def failure(usage: Usage, arch: int) -> str | None:
    """Return the reason why a compiled tile must not be shipped; None if it may."""
    reasons = []
    if usage.spills:
        reasons.append("spills")
    if usage.shared > SHARED_KIB[arch] * 1024:
        reasons.append(f"shared memory over the {SHARED_KIB[arch]} KiB of sm_{arch}")
    if usage.multiplies_16bit and usage.matrix == "none":
        reasons.append("multiplies 16-bit matrices without tensor cores")
    return "; ".join(reasons) or None


def report(tile: Tile) -> list[dict[str, Any]]:
    """Return a row for each kernel: a tile of Triton is one, a CUDA source may hold several."""
    row = {"sm": tile.arch, "kernel": tile.module, "tile": tile.name}
    try:
        if isinstance(tile.entry, Path):
            found = compile_cuda(tile.entry, tile.arch)
        else:
            found = [(tile.name, compile_tile(tile.entry, tile.arch))]
    except Exception as error:  # name the tile and go on with the rest
        return [{**row, "failure": " ".join(f"{type(error).__name__}: {error}".split())}]
    return [{**row, "tile": name, **usage._asdict(), "failure": failure(usage, tile.arch)} for name, usage in found]


def report_all(tiles: Sequence[Tile], jobs: int) -> Iterator[list[dict[str, Any]]]:
    """Yield report(tile) for every tile, in order."""
    if jobs == 1:
        yield from map(report, tiles)
        return
    _inherited[:] = tiles
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_report_inherited, range(len(tiles)))


_inherited: list[Tile] = []  # kernels do not survive pickling, so the workers are forks that find them here


def _report_inherited(index: int) -> list[dict[str, Any]]:
    return report(_inherited[index])


def summary(rows: list[dict[str, Any]], arch: int) -> str:
    """Return the extremes of a kernel's tiles on one architecture in a line."""
    compiled = [row for row in rows if row["sm"] == arch and "registers" in row]
    failed = sum(row["sm"] == arch and row["failure"] is not None for row in rows)
    if not compiled:
        return f"sm_{arch}: nothing compiled, {failed} failed"
    registers, shared, spills = (max(row[key] for row in compiled) for key in ("registers", "shared", "spills"))
    return (
        f"sm_{arch}: {len(compiled)} tiles, at most {registers} registers, {shared / 1024:.1f} of {SHARED_KIB[arch]} "
        f"KiB shared, {spills} B spilled, {failed} failed"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, e.g. 90")
    parser.add_argument("--only", help="one Triton module or CUDA source, e.g. prediction_loss")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes [all processors]")
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    found = pkgutil.iter_modules(cjepa_fast.kernels.__path__)
    modules = [module.name for module in found if not module.name.startswith("_")]  # those hold device functions
    known = dict.fromkeys([*modules, *(path.stem for path in CUDA_SOURCES)])
    if arguments.only is not None and arguments.only not in known:
        parser.error(f"unknown kernel {arguments.only!r}; known: {', '.join(known)}")
    if unknown := set(arguments.arch) - set(SHARED_KIB):
        parser.error(f"unknown compute capability {unknown.pop()}; known: {', '.join(map(str, SHARED_KIB))}")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

    wanted = [name for name in known if arguments.only in (None, name)]
    tiles = [
        Tile(name, entry["name"], entry, arch)
        for name in wanted
        if name in modules
        for entry in getattr(importlib.import_module(f"cjepa_fast.kernels.{name}"), "AOT", [])
        for arch in arguments.arch
    ]
    sources = [path for path in CUDA_SOURCES if path.stem in wanted]
    if shutil.which("nvcc") is not None:
        tiles += [Tile(path.stem, path.name, path, arch) for path in sources for arch in arguments.arch]

    rows: list[dict[str, Any]] = []
    columns = f"{'registers':>9} {'shared_B':>8} {'spill_B':>7} {'stages':>6}  matrix"
    print(f"{'sm':>3}  {'kernel':<20} {'tile':<44} {columns}", flush=True)
    for compiled in report_all(tiles, arguments.jobs):
        for row in compiled:
            rows.append(row)
            line = f"{row['sm']:>3}  {row['kernel']:<20} {row['tile']:<44}"
            if "registers" in row:
                stages = "" if row["stages"] is None else row["stages"]
                line += f" {row['registers']:>9} {row['shared']:>8} {row['spills']:>7} {stages:>6}  {row['matrix']}"
            print(line + (f"  FAILED: {row['failure']}" if row["failure"] else ""), flush=True)
    for name in wanted:
        own = [row for row in rows if row["kernel"] == name]
        for arch in arguments.arch if own else []:
            print(f"{name:<20} {summary(own, arch)}")
        if not own and name in modules:
            print(f"{name:<20} lists no tiles")
    if sources and shutil.which("nvcc") is None:
        print(f"not compiled, as nvcc is not on the PATH: {', '.join(path.name for path in sources)}")
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
