"""Starting and ending the processes of an instance's other ranks, and what became of each."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from distserve.engine.group.messages import RankPlan, encode


class RankProcesses:
    """The nursery with its ranks. ``ranks[r]`` leads to rank r (from 1 on), ``nursery`` to the nursery."""

    def __init__(self, plan: RankPlan) -> None:
        """Start the processes of ``plan``; they begin to load at once."""
        num_ranks = plan.parallel.num_ranks
        pairs = [socket.socketpair() for _ in range(num_ranks)]
        theirs = [pair[1].fileno() for pair in pairs]
        self._nursery_process = subprocess.Popen(  # noqa: S603 - our own module, our own interpreter
            [sys.executable, "-m", "distserve.engine.group.nursery", *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        for _, other in pairs:
            other.close()
        self._sockets = [own for own, _ in pairs]
        ends = [Connection(os.dup(own.fileno())) for own, _ in pairs]
        self.nursery = ends[0]
        self.ranks = {rank: ends[rank] for rank in range(1, num_ranks)}
        self.nursery.send_bytes(encode(plan))

    def kill(self) -> None:
        """End all processes and wait until they have ended; then every end reads as closed. May be called twice."""
        # Closing would not do: a thread that waits on an end keeps its socket open.
        for own in self._sockets:
            with contextlib.suppress(OSError):  # shut already
                own.shutdown(socket.SHUT_RDWR)
        self._nursery_process.wait()

    def release(self) -> None:
        """Close the ends, which nobody reads any more."""
        for own in self._sockets:
            own.close()
        for end in (self.nursery, *self.ranks.values()):
            end.close()


def describe_status(status: int) -> str:
    """What an exit status means, in words; negative ones are signals."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
