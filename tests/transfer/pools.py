"""What the transfer tests share: small layouts, recognisable KV, a recorder of ended pulls, patience."""

import math
import queue
import time
from collections.abc import Callable

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.events import Migrated

LAYOUT = KvLayout(num_layers=4, num_blocks=32, block_size=16, num_kv_heads=2, head_dim=8, dtype="bfloat16")
SECRET = b"of the tests"


def blocks_of(buffer: memoryview, layout: KvLayout) -> np.ndarray:
    """View of ``[L, 2, N, bytes of a block]``."""
    return np.frombuffer(buffer, dtype=np.uint8).reshape(layout.num_layers, 2, layout.num_blocks, -1)


def fill(buffer: memoryview, layout: KvLayout, seed: int) -> None:
    blocks = blocks_of(buffer, layout)
    blocks[:] = np.random.default_rng(seed).integers(1, 256, blocks.shape, dtype=np.uint8)


def migrate(
    pull_id: int, src_blocks, dst_blocks, *, ready: int | None = None, step: int = 0, deadline=math.inf
) -> Migrate:
    src_blocks, dst_blocks = tuple(src_blocks), tuple(dst_blocks)
    num_ready = len(src_blocks) if ready is None else ready
    return Migrate(pull_id, (f"r{pull_id}", 0), "source", src_blocks, dst_blocks, num_ready, step, deadline)


class Ended:
    """A ``done`` callback that keeps what it is given."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Migrated] = queue.SimpleQueue()

    def __call__(self, event: Migrated) -> None:
        self._queue.put(event)

    def next(self, timeout: float = 20.0) -> Migrated:
        return self._queue.get(timeout=timeout)

    def none(self, seconds: float = 0.05) -> bool:
        try:
            self._queue.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether ``condition`` comes true before long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False
