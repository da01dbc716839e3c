"""Ranks with pools in torch's memory, communicators over sockets, faults to order; and pulls between them."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from distserve.core.config import KvLayout
from distserve.transfer.nccl.device import CpuDevice
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.nccl.transport import NcclTransport
from tests.transfer.pools import LAYOUT, SECRET, Ended, eventually, migrate

LIMITS = Limits(
    min_piece_bytes=LAYOUT.block_bytes * 4, open_timeout=1.0, transfer_timeout=0.5, close_timeout=0.5, grace=0.2
)
"""Four layers of 32 blocks are 64 pieces; nothing waits long."""
LATE = 2.0
"""Seconds within which a pull with a deadline ends after it, on a busy machine."""


class Faults:
    """What the next calls of a rank's library do in place of what they should."""

    def __init__(self) -> None:
        self.hang_in_init = self.fail_in_init = 0
        self.hang_in_send = self.fail_in_send = self.hang_on_stream = self.break_on_stream = 0
        self.delay = 0.0
        self.hang_in_abort = False
        self.over = threading.Event()
        """Those who hang wake up."""

    def takes(self, fault: str) -> bool:
        left = getattr(self, fault)
        if left > 0:
            setattr(self, fault, left - 1)
        return left > 0

    def hang(self) -> None:
        self.over.wait(60)


class Held:
    """An operation that has not ended, whatever the stream says."""

    def __init__(self, inner, faults: Faults, *, delay: float = 0.0, hangs: bool = False) -> None:
        self._inner, self._until, self._hangs, self._faults = inner, time.monotonic() + delay, hangs, faults
        self.is_aborted = False

    def query(self) -> bool:
        if self.is_aborted:
            return True
        return not self._hangs and time.monotonic() >= self._until and self._inner.query()


@dataclass
class FaultyCommunicator:
    inner: object
    faults: Faults
    owner: "FaultyCollectives"
    error: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    is_aborted: bool = False
    held: list[Held] = field(default_factory=list)

    def _launch(self, launch, memory):
        if self.faults.takes("fail_in_send"):
            raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: as ordered")
        if self.faults.takes("hang_in_send"):
            # As NCCL's host side does until the peer's call, or an abort.
            self.released.wait(60)
            raise RuntimeError("NCCL_ERROR_INTERNAL_ERROR: aborted")
        if self.faults.takes("break_on_stream"):
            self.error = "NCCL_ERROR_SYSTEM_ERROR: remote process exited"
        hangs = self.faults.takes("hang_on_stream")
        held = Held(launch(memory) if not hangs else None, self.faults, delay=self.faults.delay, hangs=hangs)
        self.held.append(held)
        # An abort that came meanwhile has not seen it.
        held.is_aborted |= self.is_aborted
        return held

    def send(self, memory):
        return self._launch(self.inner.send, memory)

    def recv(self, memory):
        return self._launch(self.inner.recv, memory)

    def check(self):
        if self.error:
            raise RuntimeError(self.error)
        self.inner.check()

    def abort(self):
        self.released.set()
        if self.faults.hang_in_abort:
            self.faults.hang()
        self.inner.abort()
        self.is_aborted = True
        for held in self.held:
            held.is_aborted = True
        self.owner.live.discard(id(self))

    def destroy(self):
        self.inner.destroy()
        self.owner.live.discard(id(self))


class FaultyCollectives:
    """Real communicators over sockets, but for the faults ordered. Counts those that live."""

    version = "1.2.3"

    def __init__(self) -> None:
        self.faults = Faults()
        self.inner = SocketCollectives()
        self.live: set[int] = set()
        self.most_live = 0
        self.num_made = 0

    def unique_id(self) -> bytes:
        return self.inner.unique_id()

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2):
        if self.faults.takes("fail_in_init"):
            raise RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: as ordered")
        if self.faults.takes("hang_in_init"):
            self.faults.hang()
            raise RuntimeError("woken up")
        made = FaultyCommunicator(self.inner.communicator(unique_id, rank, num_ranks), self.faults, self)
        self.num_made += 1
        self.live.add(id(made))
        self.most_live = max(self.most_live, len(self.live))
        return made


class Gate:
    """An event on a stream that passes when a test says so."""

    def __init__(self) -> None:
        self.is_open = False

    def query(self) -> bool:
        return self.is_open


class LateDevice(CpuDevice):
    """A device whose compute stream is behind: what the steps record passes when a test says so."""

    def __init__(self) -> None:
        self.is_late = False
        self.gates: list[Gate] = []

    def record(self):
        if not self.is_late or threading.current_thread().name.startswith("kv-"):
            return super().record()
        self.gates.append(Gate())
        return self.gates[-1]


class Rank:
    """A transport and all that belongs to it."""

    def __init__(
        self, layout: KvLayout = LAYOUT, *, seed: int | None = None, limits=LIMITS, clock=time.time, secret=SECRET
    ):
        self.layout = layout
        self.pool = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        if seed is not None:
            values = np.random.default_rng(seed).integers(1, 256, layout.num_bytes, dtype=np.uint8)
            self.pool.copy_(torch.from_numpy(values))
        self.collectives = FaultyCollectives()
        self.faults = self.collectives.faults
        self.device = LateDevice()
        self.transport = NcclTransport(
            layout,
            self.pool,
            host="127.0.0.1",
            secret=secret,
            clock=clock,
            limits=limits,
            collectives=self.collectives,
            device=self.device,
        )

    @property
    def blocks(self) -> torch.Tensor:
        """``[L, 2, N, bytes of a block]``."""
        return self.pool.view(self.layout.num_layers, 2, self.layout.num_blocks, -1)

    @property
    def hub(self):
        return self.transport._hub

    @property
    def generation(self) -> int:
        """The newest communicator's."""
        return max((link.generation for link in self.hub.links.values()), default=0)

    def is_clean(self) -> bool:
        """No slot is taken, no pull known."""
        rings = (self.hub.outgoing, self.hub.incoming)
        return all(ring.num_free == ring.num_slots for ring in rings) and not self.transport._driver._pulls

    def close(self) -> None:
        self.faults.over.set()
        self.transport.close()
        self.collectives.inner.close()


def pull(sink: Rank, pull_id: int, blocks, *, seconds: float = 20.0, **options) -> Ended:
    """Pull blocks of "source" to the same places."""
    ended = Ended()
    sink.transport.pull(migrate(pull_id, blocks, blocks, deadline=time.time() + seconds, **options), ended)
    return ended


def arrived(source, sink, src_blocks, dst_blocks, layers=slice(None)) -> bool:
    return torch.equal(sink.blocks[layers][:, :, list(dst_blocks)], source.blocks[layers][:, :, list(src_blocks)])


def untouched(sink, blocks) -> bool:
    return not sink.blocks[:, :, list(blocks)].any()


def as_good_as_new(source: Rank, sink: Rank) -> None:
    """The next pull of the pair arrives, and then nothing is left of any."""
    assert eventually(lambda: pull(sink, 1000 + time.monotonic_ns(), (7, 9), seconds=2).next().ok)
    assert arrived(source, sink, (7, 9), (7, 9))
    assert eventually(source.is_clean)
    assert eventually(sink.is_clean)
