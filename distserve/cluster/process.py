"""A process's own standing with the operating system: its parent, its CPUs, its memory."""

import ctypes
import logging
import os
import signal
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_EXIT_SOFTWARE = 70


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux): an orphaned instance serves nobody."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def die_of_uncaught_errors() -> None:
    """Have an exception that no thread expected end the process: it is a bug, and half a part is worse than none.

    Supervision replaces the part; its state was suspect.
    """

    def on_error(error: threading.ExceptHookArgs) -> None:
        logger.critical("uncaught", exc_info=error.exc_value)
        os._exit(_EXIT_SOFTWARE)

    threading.excepthook = on_error


def pin_process(cores: tuple[int, ...]) -> None:
    """Keep every thread of this process on ``cores``; no cores leaves them where they are."""
    if not cores:
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:
            continue  # a thread that just ended


def own_cores(first: int, count: int, wanted: int) -> tuple[int, ...]:
    """CPUs ``first .. first + count`` of those this process may use, or none if fewer than ``wanted`` are there."""
    available = sorted(os.sched_getaffinity(0))
    return tuple(available[first : first + count]) if wanted <= len(available) else ()


def return_freed_memory() -> None:
    """Give what loading has freed back to the operating system, where the C library (glibc) can: tens of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
