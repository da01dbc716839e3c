"""Builds the native code; where that fails, the torch and numpy fallbacks serve.

Everything else about the package is in pyproject.toml. The libraries are plain C loaded through ctypes, not Python
modules; building them as optional extensions puts them where their loaders look.

With DISTSERVE_COMPILE=1 in the environment (`make fast`) mypyc compiles, besides, the modules that a simulation spends
its time in: they run two to two and a half times as fast, and are the same sources.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

from setuptools import Extension, setup

from build_backend import has_compiler

KERNELS = "kernels/distserve_kernels/csrc"
FLAGS = ["-O3", "-std=gnu11"]

# build_backend asks for ziglang where there is no compiler; it is not there yet while requirements are collected.
ZIG = importlib.util.find_spec("ziglang")
if ZIG is not None and ZIG.origin is not None and not has_compiler():
    os.environ["CC"] = f"{Path(ZIG.origin).with_name('zig')} cc"

# What travels between processes stays interpreted: its classes are taken apart and put together by other libraries.
SCHEDULING = ("block_manager", "budget", "decode", "decoding", "handoff", "hybrid", "instance_view", "intake")
SCHEDULING += ("mixed", "pace", "prefill", "prefix", "prompt_choice", "receiving", "report_timer", "role_changes")
SCHEDULING += ("routed_prefixes", "router", "scheduler", "sequence", "totals")
SIMULATION = ("client", "engine", "host", "host_loop", "loop", "network", "passage", "pulls", "routes", "worker")
SIMULATION += ("latency/runs",)
COMPILED = [f"distserve/core/{name}.py" for name in SCHEDULING] + [f"simulator/{name}.py" for name in SIMULATION]


# Other projects stay unseen: to look through all that is imported would take five times as long as compiling.
UNSEEN = ("aiohttp", "fastapi", "huggingface_hub", "matplotlib", "numpy", "pydantic", "ray", "rich", "torch")
UNSEEN += ("transformers",)
MYPY = f"""
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-{",".join(f"{name}.*" for name in UNSEEN)}]
follow_imports = skip
follow_imports_for_stubs = True
"""


def compiled() -> list[Extension]:
    """The extensions that mypyc makes, where they are asked for."""
    if not os.environ.get("DISTSERVE_COMPILE"):
        return []
    from mypyc.build import mypycify

    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        config.write(MYPY)
        config.flush()
        extensions = mypycify([f"--config-file={config.name}", *COMPILED])
    for extension in extensions:
        # A product and a sum in one rounding, where a processor has that, would not be what the interpreter says.
        extension.extra_compile_args.append("-ffp-contract=off")
    return extensions


setup(
    ext_modules=[
        *compiled(),
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
