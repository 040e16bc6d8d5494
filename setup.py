"""Packages and the optional native library; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup

build = runpy.run_path(str(Path(__file__).parent / "cjepa_fast" / "native" / "build.py"))
library = Extension(
    "cjepa_fast._native",  # no Python module: cjepa_fast.native opens the file with ctypes
    sources=[f"csrc/{path.name}" for path in build["sources"]("cpp")],
    depends=[f"csrc/{path.name}" for path in build["sources"]("h")],
    define_macros=[("CJEPA_SOURCE_HASH", f'"{build["source_hash"]("cpp", build["HOST_FLAGS"])}"')],
    extra_compile_args=[*build["HOST_FLAGS"], "-g0"],  # Python asks for debug information
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,  # without a compiler the package installs; NumPy then samples the masks and torch resizes
)

rooms = sorted(path.parent.name for path in Path(__file__).parent.glob("cjepa_fast/*/__init__.py"))
setup(
    packages=["cjepa_fast", "cjepa_fast.kernels", *(f"cjepa_fast.{room}" for room in rooms)],
    package_data={"cjepa_fast": ["csrc/*"]},  # so that an installed package can build the library at run time
    ext_modules=[library],
)
