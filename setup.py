"""Builds the native code where a C compiler is found; without one the torch and numpy fallbacks serve.

Everything else about the package is in pyproject.toml. The libraries are plain C loaded through ctypes, not Python
modules; building them as optional extensions puts them where their loaders look.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = "kernels/distserve_kernels/csrc"
FLAGS = ["-O3", "-std=gnu11"]

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
