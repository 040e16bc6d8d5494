"""Compiles every shipped tile of every kernel ahead of time, without a GPU, and prints what ptxas says of it.

    python -m bench.compile_report [--arch 80 90 100] [--only prediction_loss]

Exit code 1 if a tile fails to compile or spills registers to memory. A kernel module takes part by listing its tiles
as `AOT`: dicts of name, kernel, signature (argument to Triton type, ":16" appended for multiples of 16) and constants
(compile-time arguments and num_warps).
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import cjepa_fast.kernels


class Usage(NamedTuple):
    """Registers per thread, bytes of shared memory per program, bytes spilled per thread (stores and loads)."""

    registers: int
    shared: int
    spills: int


def compile_tile(tile: dict[str, Any], arch: int) -> Usage:
    """Compiles one entry of `AOT` for compute capability `arch` (90 for Hopper); raises whatever Triton raises."""
    kernel, constants = tile["kernel"], dict(tile["constants"])
    options = {"num_warps": constants.pop("num_warps")}
    given = {**tile["signature"], **dict.fromkeys(constants, "constexpr")}
    assert set(given) == set(kernel.arg_names), set(given) ^ set(kernel.arg_names)
    signature = {name: given[name].removesuffix(":16") for name in kernel.arg_names}
    multiples = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                 for name, kind in given.items() if kind.endswith(":16")}  # fmt: skip
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # Triton reads registers and spills from the driver, which is not there; ptxas prints them
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
    return Usage(int(registers[1]), compiled.metadata.shared, sum(map(int, spills)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel tile ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, e.g. 90")
    parser.add_argument("--only", help="one kernel module, e.g. prediction_loss")
    arguments = parser.parse_args()
    modules = [module.name for module in pkgutil.iter_modules(cjepa_fast.kernels.__path__)]
    if arguments.only is not None and arguments.only not in modules:
        parser.error(f"unknown kernel {arguments.only!r}; known: {', '.join(modules)}")

    failures = 0
    print(f"{'sm':>3}  {'kernel':<18} {'tile':<38} {'registers':>9} {'shared_B':>8} {'spill_B':>7}")
    for name in [arguments.only] if arguments.only else modules:
        for tile in getattr(importlib.import_module(f"cjepa_fast.kernels.{name}"), "AOT", []):
            for arch in arguments.arch:
                row = f"{arch:>3}  {name:<18} {tile['name']:<38}"
                try:
                    usage = compile_tile(tile, arch)
                except Exception as error:  # the report is the point: name the tile and go on with the rest
                    failures += 1
                    print(f"{row} failed: {error!r}")
                    continue
                failures += usage.spills > 0
                print(f"{row} {usage.registers:>9} {usage.shared:>8} {usage.spills:>7}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
