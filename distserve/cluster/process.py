"""A process's own standing with the operating system: its parent, its CPUs."""

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux): an orphaned instance serves nobody."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


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
