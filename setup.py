"""Builds the native code; where that fails, the torch and numpy fallbacks serve.

Everything else about the package is in pyproject.toml. The libraries are plain C loaded through ctypes, not Python
modules; building them as optional extensions puts them where their loaders look.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup

from build_backend import has_compiler

KERNELS = "kernels/distserve_kernels/csrc"
FLAGS = ["-O3", "-std=gnu11"]

# build_backend asks for ziglang where there is no compiler; it is not there yet while requirements are collected.
ZIG = importlib.util.find_spec("ziglang")
if ZIG is not None and ZIG.origin is not None and not has_compiler():
    os.environ["CC"] = f"{Path(ZIG.origin).with_name('zig')} cc"

setup(
    ext_modules=[
        Extension(
            "distserve_kernels._native",
            sources=sorted(str(path) for path in Path(KERNELS).glob("*.c")),
            depends=[f"{KERNELS}/common.h"],
            extra_compile_args=FLAGS,
            optional=True,
        ),
        Extension(
            "distserve.transfer._copy",
            sources=["distserve/transfer/copy.c"],
            extra_compile_args=FLAGS,
            optional=True,
        ),
    ],
)
