"""Packages and the optional native library; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup

native = runpy.run_path(str(Path(__file__).parent / "cjepa_fast" / "native" / "host.py"))
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

rooms = sorted(path.parent.name for path in Path(__file__).parent.glob("cjepa_fast/*/__init__.py"))
setup(
    packages=["cjepa_fast", "cjepa_fast.kernels", *(f"cjepa_fast.{room}" for room in rooms)],
    package_data={"cjepa_fast": ["csrc/*"]},  # so that an installed package can build the library at run time
    ext_modules=[library],
)
