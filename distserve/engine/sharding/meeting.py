"""Where the ranks of an instance find each other: torch's rendezvous stores."""

import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

LOOPBACK = "127.0.0.1"

c10d: Any = distributed
"""torch.distributed, whose stores are not typed."""

_ENDED = "ended"
_POLL = 0.02
"""Seconds between two looks at who has come."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """``store`` is the address of rank 0's :class:`FileStore` or :class:`HostedStore`.

    ``host`` is the address at which this rank listens for the others; loopback reaches ranks of the same node alone.
    """

    store: str
    host: str = LOOPBACK

    def attend(self, rank: int, num_ranks: int, timeout: float) -> "Attendance":
        """Come to it as ``rank``; returns when all ranks have.

        Ranks may wait for each other in its store for ``timeout`` seconds at a time.

        Raises:
            RuntimeError: they have not all come in that time, or not all will; or torch's own.
        """
        patience = timedelta(seconds=timeout)
        host, _, port = self.store.rpartition(":")
        is_file = not host or "/" in self.store
        if is_file:
            store = c10d.FileStore(self.store, num_ranks)
            store.set_timeout(patience)
        else:
            store = c10d.TCPStore(host, int(port), is_master=False, timeout=patience)
        attendance = Attendance(store, _end_of(self.store) if is_file else None, rank, num_ranks, timeout)
        attendance.wait_for_all("here")
        return attendance


class Attendance:
    """A rank at a meeting; ``store`` is torch's."""

    def __init__(self, store: Any, end: Path | None, rank: int, num_ranks: int, timeout: float) -> None:
        self.store = store
        self._end = end
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout

    def wait_for_all(self, point: str) -> None:
        """Say that this rank has reached ``point``; returns when all ranks have.

        Torch's own waits go on whatever has become of the others, NCCL's for ever.

        Raises:
            RuntimeError: they have not all reached it in time, or not all will; or torch's own.
        """
        self.store.set(f"{point}-{self._rank}", b"")
        deadline = time.monotonic() + self._timeout
        missing = list(range(self._num_ranks))
        while missing := [rank for rank in missing if not self.store.check([f"{point}-{rank}"])]:
            self._check()
            if time.monotonic() > deadline:
                names = ", ".join(str(rank) for rank in missing)
                raise RuntimeError(f"rank {names} did not get as far within {self._timeout:g} s")
            time.sleep(_POLL)
        self._check()

    def _check(self) -> None:
        has_ended = self.store.check([_ENDED]) if self._end is None else self._end.exists()
        if has_ended:
            raise RuntimeError("another rank is lost")


def _end_of(store: str) -> Path:
    """A file that is there once a rank will not come any more to the store that is the file ``store``."""
    return Path(f"{store}-{_ENDED}")


def listen(host: str) -> socket.socket:
    """A TCP socket that listens on ``host``, IPv4 or IPv6, at a free port; OSError if that is no address here."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class FileStore:
    """Rank 0's store for ranks of its own node: a file in a private directory, which only their user can enter."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="distserve-ranks-")
        self.address = str(Path(self._directory.name) / "store")
        self._lock = threading.Lock()
        self._is_closed = False

    def end(self) -> None:
        """A rank is lost: those who wait for it need not. From any thread."""
        with self._lock:
            if not self._is_closed:
                _end_of(self.address).touch()

    def close(self) -> None:
        """Remove it; may be called twice. Not while a rank waits there, which would wait on."""
        with self._lock:
            self._is_closed = True
            self._directory.cleanup()


class HostedStore:
    """Rank 0's store for ranks of several nodes, at ``host`` until closed.

    Like the connections between ranks it asks nobody who they are: torch's stores, gloo and NCCL are for a network that
    only the cluster is in.
    """

    def __init__(self, host: str) -> None:
        """Listen on ``host``; raises OSError if that is no address of this machine."""
        # Bound here: torch itself would listen on all addresses.
        with listen(host) as listener:
            port = listener.getsockname()[1]
            self._store: Any = c10d.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self.address = f"{host}:{port}"

    def end(self) -> None:
        """A rank is lost: those who wait for it need not. From any thread."""
        store = self._store
        if store is not None:
            store.set(_ENDED, b"")

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self._store = None
