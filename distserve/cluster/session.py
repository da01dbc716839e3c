"""What one launch leaves on a machine while it runs, and the guarantee that none of it stays.

A session is a temporary directory (Ray keeps its sockets and logs there), an environment variable that every process
started from here inherits, and a small child process, :mod:`distserve.cluster.reaper`, that kills those processes and
removes the directory once the launcher is gone, be it by exit or by SIGKILL.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from distserve.cluster import reaper

_PREFIX = "distserve-"
_LONGEST_TEMP = 24
"""Ray's socket paths must fit in 107 characters; a longer temporary directory gives way to /tmp."""


class Session:
    """Owns everything a launch starts on this machine.

    Attributes:
        directory: Private directory, gone after the session.
    """

    def __init__(self) -> None:
        temp = tempfile.gettempdir()
        root = Path(temp if len(temp) <= _LONGEST_TEMP else "/tmp")  # noqa: S108 - mkdtemp makes it private
        _remove_abandoned(root)
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        # The lock lives as long as launcher or reaper; a directory nobody has locked was left by a dead machine.
        self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._reaper = subprocess.Popen(  # noqa: S603 - our own file, our own interpreter
            [sys.executable, "-I", "-S", reaper.__file__, str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(self._lock,),
            start_new_session=True,
        )
        os.environ[reaper.MARK] = str(self.directory)

    def close(self) -> None:
        """End the session: whatever was started within it is dead and the directory gone when this returns."""
        if self._reaper.stdin is not None and not self._reaper.stdin.closed:
            os.environ.pop(reaper.MARK, None)
            self._reaper.stdin.close()
            os.close(self._lock)
        self._reaper.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_abandoned(root: Path) -> None:
    """Remove session directories of this user that neither a launcher nor a reaper holds."""
    for directory in root.glob(f"{_PREFIX}*"):
        try:
            if directory.stat().st_uid != os.getuid():
                continue
            lock = os.open(directory / "lock", os.O_RDWR)
        except OSError:
            continue  # just removed, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(lock)
