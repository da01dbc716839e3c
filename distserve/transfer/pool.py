"""The KV memory of one rank and its progress words, held by descriptors: what one or several transports offer."""

import mmap
import os

import numpy as np

from distserve.core.config import KvLayout
from distserve.transfer import segment
from distserve.transfer.copy import Bytes
from distserve.transfer.progress import SourceProgress


class Pool:
    """Memory for ``layout``, all zero, under a new generation. Linux only.

    Raises :class:`~distserve.core.errors.TransferError` if the memory cannot be had.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.fd, self.memory = segment.create("distserve-kv", layout.num_bytes)
        self.progress_fd, words = segment.create("distserve-progress", mmap.PAGESIZE)
        self.progress = SourceProgress(memoryview(words))
        self.progress.open()
        self.generation = self.progress.generation
        self._closed = False

    @property
    def bytes(self) -> Bytes:
        """The memory, flat."""
        return np.frombuffer(self.memory, dtype=np.uint8)

    def close(self) -> None:
        """Retire the generation and let go of the descriptors; the memory goes when nothing maps it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.progress.retire()
        os.close(self.fd)
        os.close(self.progress_fd)
