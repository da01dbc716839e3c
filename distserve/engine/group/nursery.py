"""Starts an instance's ranks on one node, but for rank 0: ``python -m distserve.engine.group.nursery FD0 FD1 ...``.

A process of its own, so that nothing of the host process (threads, memory, sockets) is forked. ``FD0`` leads to rank 0,
``FD1`` is the socket of the node's first rank that is not rank 0, and so on. It imports what ranks need, forks them,
reports how each ends, and lives as long as rank 0 and as whoever started it, who keeps its standard input open: when
one of them is gone, it kills the ranks and ends. When the nursery itself is killed, the kernel kills them.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import sys
from multiprocessing.connection import Connection, wait

from distserve.engine.group.messages import Ended, encode, receive_plan
from distserve.engine.group.rank import run_rank

_PR_SET_PDEATHSIG = 1


def main(descriptors: list[int]) -> None:
    """Run until rank 0 or the starter is gone."""
    parent = Connection(descriptors[0])
    if sys.stdin.fileno() in wait([parent, sys.stdin.fileno()]):
        return
    try:
        plan = receive_plan(parent)
    except EOFError:
        return
    ranks: dict[int, tuple[int, int]] = {}
    others = (rank for rank in plan.ranks if rank != 0)
    for rank, descriptor in zip(others, descriptors[1:], strict=True):
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            try:
                status = run_rank(plan, rank, Connection(descriptor))
            except EOFError:
                status = os.EX_OK  # rank 0 was gone when it was to be told of a failure
            os._exit(status)
        ranks[os.pidfd_open(pid)] = (rank, pid)
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    _watch(parent, ranks)


def _watch(parent: Connection, ranks: dict[int, tuple[int, int]]) -> None:
    """Report each rank's end until the parent or the starter is gone, then kill those left."""
    masters = (parent.fileno(), sys.stdin.fileno())
    with selectors.DefaultSelector() as selector:
        for descriptor in (*masters, *ranks):
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in masters:
                    for _, pid in ranks.values():
                        os.kill(pid, signal.SIGKILL)
                    for _, pid in ranks.values():
                        os.waitpid(pid, 0)
                    return
                rank, pid = ranks.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # then the loop is about to see that the parent is gone
                    parent.send_bytes(encode(Ended(rank, os.waitstatus_to_exitcode(status))))


def _die_with_parent() -> None:
    """Have the kernel kill this process when the nursery dies (Linux)."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG)")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
