"""The KV memory of one rank on a device, with its progress words, which are in host memory."""

import mmap
import os

from distserve.core.config import KvLayout
from distserve.transfer import segment
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.progress import SourceProgress


class DevicePool:
    """Memory of ``device`` for ``layout``, all zero, under a new generation. Implements ``Offer``.

    ``bytes`` is the memory, flat uint8. Raises :class:`~distserve.core.errors.TransferError` if it cannot be had.
    """

    def __init__(self, layout: KvLayout, device: Device) -> None:
        self.layout = layout
        self.device = device
        self.fd, self.bytes = device.allocate(layout.num_bytes)
        try:
            self.progress_fd, words = segment.create("distserve-progress", mmap.PAGESIZE)
        except BaseException:
            os.close(self.fd)
            raise
        self.progress = SourceProgress(memoryview(words))
        self.progress.open()
        self.generation = self.progress.generation
        self._closed = False

    def close(self) -> None:
        """Retire it and let go of the descriptors; the memory goes when nothing refers to it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.progress.retire()
        os.close(self.fd)
        os.close(self.progress_fd)
