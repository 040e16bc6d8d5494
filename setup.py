"""Packages and the optional native library; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup

native = runpy.run_path(str(Path(__file__).parent / "cjepa_fast" / "native.py"))
library = Extension(
    "cjepa_fast._native",  # no Python module: native.py opens the file with ctypes
    sources=[f"csrc/{path.name}" for path in native["sources"]()],
    depends=[f"csrc/{path.name}" for path in native["headers"]()],
    define_macros=[("CJEPA_SOURCE_HASH", f'"{native["source_hash"]()}"')],
    extra_compile_args=[*native["FLAGS"], "-g0"],  # Python asks for debug information
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,  # without a compiler the package installs and samples its masks with NumPy, resizes with torch
)

setup(
    packages=["cjepa_fast", "cjepa_fast.ops", "cjepa_fast.kernels"],
    package_data={"cjepa_fast": ["csrc/*"]},  # so that an installed package can build the library at run time
    ext_modules=[library],
)
