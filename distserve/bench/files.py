"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then move it there: whoever looks sees all of it or nothing.

    A link stays one, and what it points at is written. What is no file (``/dev/stdout``) is written as it is.
    """
    if is_no_file(path):
        write(path)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_no_file(path: Path) -> bool:
    """Whether ``path`` is there and is a pipe, a terminal or the like, which no file can be moved to."""
    # Of the path itself: a pipe that /dev/stdout leads to has no name to resolve to.
    return path.exists() and not path.is_file()
