"""setuptools' build backend, with a C compiler from PyPI where the machine has none.

The native code then builds from a plain ``pip install`` anywhere: ziglang's wheel carries a complete C compiler, and
setup.py uses it. It is asked for only where the interpreter's own compiler is missing.
"""

import os
import shutil
import sysconfig
from collections.abc import Mapping

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def has_compiler() -> bool:
    """Whether the compiler that setuptools would call exists."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(command.split()[0]) is not None


def _compiler_requirement() -> list[str]:
    return [] if has_compiler() else ["ziglang>=0.13"]


def get_requires_for_build_wheel(config_settings: Mapping[str, object] | None = None) -> list[str]:
    """What building a wheel needs installed."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler_requirement()]


def get_requires_for_build_editable(config_settings: Mapping[str, object] | None = None) -> list[str]:
    """What an editable install needs installed."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler_requirement()]
