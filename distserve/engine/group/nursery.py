"""Starts the ranks of an instance other than rank 0: ``python -m distserve.engine.group.nursery FD0 FD1 ...``.

A process of its own, so that nothing of the host process (threads, memory, sockets) is forked. ``FD0`` leads to rank 0,
``FD1`` is the socket of rank 1, and so on. It imports what ranks need, forks them, reports how each ends, and lives as
long as rank 0: when that is gone, it kills them and ends. When the nursery itself is killed, the kernel kills them.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import sys
from multiprocessing.connection import Connection

from distserve.engine.group.messages import Ended, encode, receive_plan
from distserve.engine.group.rank import run_rank

_PR_SET_PDEATHSIG = 1


def main(descriptors: list[int]) -> None:
    """Run until rank 0 is gone."""
    parent = Connection(descriptors[0])
    plan = receive_plan(parent)
    ranks: dict[int, tuple[int, int]] = {}
    for rank, descriptor in enumerate(descriptors[1:], start=1):
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            os._exit(run_rank(plan, rank, Connection(descriptor)))
        ranks[os.pidfd_open(pid)] = (rank, pid)
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    _watch(parent, ranks)


def _watch(parent: Connection, ranks: dict[int, tuple[int, int]]) -> None:
    """Report each rank's end until the parent is gone, then kill those left."""
    with selectors.DefaultSelector() as selector:
        selector.register(parent.fileno(), selectors.EVENT_READ)
        for pidfd in ranks:
            selector.register(pidfd, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == parent.fileno():
                    for _, pid in ranks.values():
                        os.kill(pid, signal.SIGKILL)
                    for _, pid in ranks.values():
                        os.waitpid(pid, 0)
                    return
                rank, pid = ranks.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):  # then the loop is about to see that the parent is gone
                    parent.send_bytes(encode(Ended(rank, os.waitstatus_to_exitcode(status))))


def _die_with_parent() -> None:
    """Have the kernel kill this process when the nursery dies (Linux)."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG)")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
