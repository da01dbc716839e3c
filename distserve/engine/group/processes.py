"""Starting and ending the processes of an instance's other ranks, and what became of each."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import msgspec

from distserve.core.errors import InstanceError
from distserve.engine.group.messages import RankPlan, encode
from distserve.engine.sharding.meeting import LOOPBACK


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What a node gives to the ranks of an instance that are on it, ``ranks`` in ascending order.

    They listen for the others at ``host``. ``cores`` and ``memory_options`` as of :class:`RankPlan`.
    """

    ranks: tuple[int, ...]
    host: str = LOOPBACK
    cores: tuple[int, ...] = ()
    memory_options: bytes = b""


@dataclass(frozen=True, slots=True)
class Crew:
    """Ranks that share a node, as rank 0 reaches them: the nursery that starts them, and each of them by its number."""

    share: NodeShare
    nursery: Connection
    ranks: Mapping[int, Connection]

    def close(self) -> None:
        """Let go of them; they end."""
        for end in (self.nursery, *self.ranks.values()):
            end.close()


def start_nursery(ends: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Start a nursery that has the descriptors ``ends``, its own and its ranks'; it ends when its input closes."""
    return subprocess.Popen(  # noqa: S603 - our own module, our own interpreter
        [sys.executable, "-m", "distserve.engine.group.nursery", *map(str, ends)],
        stdin=subprocess.PIPE,
        pass_fds=ends,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


class RankProcesses:
    """All ranks but rank 0: those on its node, which it starts itself, and those of ``away``, which are there already.

    ``ranks[r]`` leads to rank r (from 1 on), ``nurseries`` to what started them.
    """

    def __init__(self, plan: RankPlan, away: Sequence[Crew] = ()) -> None:
        """Start the processes of ``plan``, that of rank 0's node; all begin to load at once.

        Raises:
            InstanceError: some of ``away`` are gone.
        """
        self._child: subprocess.Popen[bytes] | None = None
        crews = list(away)
        if len(plan.ranks) > 1:
            crews.append(self._start(plan))
        self.nurseries = tuple(crew.nursery for crew in crews)
        self.ranks = {rank: end for crew in crews for rank, end in crew.ranks.items()}
        self._sockets = [socket.socket(fileno=os.dup(end.fileno())) for end in (*self.nurseries, *self.ranks.values())]
        for crew in crews:
            share = crew.share
            meeting = replace(plan.meeting, host=share.host)
            theirs = msgspec.structs.replace(
                plan, ranks=share.ranks, meeting=meeting, cores=share.cores, memory_options=share.memory_options
            )
            try:
                crew.nursery.send_bytes(encode(theirs))
            except OSError as error:
                self.kill()
                self.release()
                raise InstanceError(f"the ranks {share.ranks} of the instance are gone: {error}") from error

    def _start(self, plan: RankPlan) -> Crew:
        """The crew of rank 0's own node."""
        pairs = [socket.socketpair() for _ in plan.ranks]
        self._child = start_nursery([other.fileno() for _, other in pairs])
        for _, other in pairs:
            other.close()
        nursery, *ranks = (Connection(own.detach()) for own, _ in pairs)
        share = NodeShare(plan.ranks, plan.meeting.host, plan.cores, plan.memory_options)
        return Crew(share, nursery, dict(zip(plan.ranks[1:], ranks, strict=True)))

    def kill(self) -> None:
        """End all processes; then every end reads as closed, and those of this node have ended. May be called twice."""
        # Closing would not do: a thread that waits on an end keeps its socket open.
        for own in self._sockets:
            with contextlib.suppress(OSError):  # shut already
                own.shutdown(socket.SHUT_RDWR)
        if self._child is not None:
            self._child.communicate()  # closes its input and waits

    def release(self) -> None:
        """Close the ends, which nobody reads any more."""
        for own in self._sockets:
            own.close()
        for end in (*self.nurseries, *self.ranks.values()):
            end.close()


def describe_status(status: int) -> str:
    """What an exit status means, in words; negative ones are signals."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
