"""Cleans up after a launch, however it ended: run as a process of its own, it outlives the launcher.

``python -I -S reaper.py DIRECTORY`` waits until its standard input closes, which the kernel sees to when the launcher
exits or is killed. Then it kills every process of this user that carries ``DISTSERVE_SESSION=DIRECTORY`` in its
environment (a local Ray cluster's processes inherit it, and some of them linger for a minute after their parent's
death) and removes the directory. A process whose title has overwritten its environment, as Ray's agents' has, is known
by the files it has open there.

Standard library only, nothing imported from the package: it must start fast, stay small and survive a broken install.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "DISTSERVE_SESSION"
_PATIENCE = 10.0
"""Seconds to keep killing: a dying process may have forked."""


def marked_processes(directory: str) -> list[int]:
    """Process ids, other than this one's, that carry the mark of ``directory``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if _is_marked(entry, directory):
                found.append(int(entry.name))
        except OSError:
            continue  # another user's, or just gone
    return found


def _is_marked(process: Path, directory: str) -> bool:
    environment = (process / "environ").read_bytes()
    if f"{MARK}={directory}".encode() in environment.split(b"\0"):
        return True
    # Who merely looks at a log has an environment of its own.
    is_overwritten = b"=" not in environment.split(b"\0", 1)[0]
    return is_overwritten and any(
        str(file.readlink()).startswith(f"{directory}/") for file in (process / "fd").iterdir()
    )


def reap(directory: str) -> None:
    """Kill what carries the mark and remove the directory."""
    end = time.monotonic() + _PATIENCE
    while (processes := marked_processes(directory)) and time.monotonic() < end:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue  # it went by itself
        time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Wait for the launcher's end, then reap."""
    # Signals to the launcher's terminal or service manager are for the launcher.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    reap(sys.argv[1])


if __name__ == "__main__":
    main()
