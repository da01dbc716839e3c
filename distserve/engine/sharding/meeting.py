"""Where the ranks of an instance find each other: torch's rendezvous stores."""

import socket
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

LOOPBACK = "127.0.0.1"

c10d: Any = distributed
"""torch.distributed, whose stores are not typed."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Of ranks on one node ``store`` is a file in a private directory, not there yet: only their user can enter.

    Of ranks on several it is ``host:port``, where rank 0 has a :class:`HostedStore`. ``host`` is the address at which
    this rank listens for the others; loopback reaches ranks of the same node alone.
    """

    store: str
    host: str = LOOPBACK

    def open(self, num_ranks: int, timeout: float) -> Any:
        """The store, for ranks that wait for each other for at most ``timeout`` seconds; RuntimeError is torch's."""
        patience = timedelta(seconds=timeout)
        host, _, port = self.store.rpartition(":")
        if host and "/" not in self.store:
            store = c10d.TCPStore(host, int(port), is_master=False, timeout=patience)
        else:
            store = c10d.FileStore(self.store, num_ranks)
            store.set_timeout(patience)
        return store


def listen(host: str) -> socket.socket:
    """A TCP socket that listens on ``host``, IPv4 or IPv6, at a free port; OSError if that is no address here."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class HostedStore(AbstractContextManager["HostedStore"]):
    """Rank 0's store for ranks of other nodes, at ``host`` until closed.

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

    def __exit__(self, *_: object) -> None:
        self._store = None
