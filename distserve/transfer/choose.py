"""Which transport a pair of ranks uses, by where they are: shared memory on one host, TCP between hosts.

One pool is offered on all of them at once, so a rank can have peers near and far.
"""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from distserve.core.config import KvLayout
from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.pairwise import PairwiseTransport
from distserve.transfer.pool import Pool
from distserve.transfer.shm import ShmTransport
from distserve.transfer.source import SourceSide
from distserve.transfer.tcp import TcpTransport
from distserve.transfer.transport import Clock, PartTransport


class TransportKind(StrEnum):
    """What a user may ask for."""

    AUTO = "auto"
    """Shared memory where both ranks can reach it, else TCP."""
    SHM = "shm"
    """Shared memory only; no port is opened, and ranks of other hosts cannot be connected to."""
    TCP = "tcp"
    """TCP only, also on one host."""
    NCCL = "nccl"
    """NCCL only, also on one host: for KV in GPU memory."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a rank is, and its addresses for peers of its own machine and of others; empty where it has none."""

    machine: str
    near: str = ""
    far: str = ""

    def encode(self) -> str:
        """As the text that :meth:`decode` reads."""
        return f"{self.machine} {self.near or '-'} {self.far or '-'}"

    @classmethod
    def decode(cls, text: str) -> "Whereabouts":
        """Read what :meth:`encode` wrote; raises TransferError for anything else."""
        fields = text.split(" ")
        if len(fields) != 3:
            raise TransferError(f"{text!r} is not the address of a rank")
        machine, near, far = ("" if field == "-" else field for field in fields)
        return cls(machine, near, far)


def this_machine() -> str:
    """Name what shares memory by descriptor with this process: a boot of a kernel, network namespace and user."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/net").stat().st_ino
    return f"{boot_id}/{namespace}/{os.geteuid()}"


def choose(kind: TransportKind, ours: Whereabouts, theirs: Whereabouts) -> TransportKind:
    """Return SHM or TCP for a pair; raises TransferError, saying what to do, if the two have no way in common."""
    is_near = bool(ours.machine == theirs.machine and theirs.near)
    if is_near and kind is not TransportKind.TCP:
        return TransportKind.SHM
    if kind is TransportKind.SHM:
        raise TransferError("the peer's memory is not on this host: use the transport auto or tcp")
    if not ours.far or not theirs.far:
        which = "this rank" if not ours.far else "the peer"
        raise TransferError(
            f"the peer's memory is not on this host, and {which} is not on TCP: start it with the transport auto or "
            "tcp, and a host"
        )
    return TransportKind.TCP


class HostTransport(SourceSide, PairwiseTransport):
    """Implements :class:`~distserve.transfer.transport.PartTransport` by the transport that suits each peer.

    ``host`` is the interface to listen on for peers of other hosts, as they reach it; None opens no port, which is
    what an installation on one host wants. ``kind`` may overrule the choice. ``machine`` says who is on one host
    (default: :func:`this_machine`).

    Raises TransferError if memory for ``layout`` cannot be had, or the interface; ConfigError for ``tcp`` without a
    ``host``, and for ``nccl``.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        secret: bytes,
        clock: Clock,
        host: str | None = None,
        kind: TransportKind = TransportKind.AUTO,
        machine: str | None = None,
    ) -> None:
        if kind is TransportKind.NCCL:
            raise ConfigError("the transport nccl is for KV in GPU memory, this is the host's: use auto, shm or tcp")
        if kind is TransportKind.TCP and host is None:
            raise ConfigError("the transport tcp needs a host: the address of the interface that peers reach")
        self._layout = layout
        self._kind = kind
        pool = Pool(layout)
        self._pool, self._progress = pool.memory, pool.progress
        self._shm: ShmTransport | None = None
        self._tcp: TcpTransport | None = None
        try:
            if kind is not TransportKind.TCP:
                self._shm = ShmTransport(layout, secret=secret, clock=clock, pool=pool)
            if kind is not TransportKind.SHM and host is not None:
                self._tcp = TcpTransport(layout, host=host, secret=secret, clock=clock, pool=pool)
        except BaseException:
            if self._shm is not None:
                self._shm.close()
            pool.close()
            raise
        super().__init__([each for each in (self._shm, self._tcp) if each is not None])
        self._where = Whereabouts(
            this_machine() if machine is None else machine,
            self._shm.address if self._shm else "",
            self._tcp.address if self._tcp else "",
        )
        self._address = self._where.encode()

    def _choose(self, address: str) -> tuple[PartTransport, str]:
        theirs = Whereabouts.decode(address)
        chosen = choose(self._kind, self._where, theirs)
        transport = self._shm if chosen is TransportKind.SHM else self._tcp
        assert transport is not None, f"{chosen} was chosen without being there"
        return transport, theirs.near if chosen is TransportKind.SHM else theirs.far
