"""A device without a card: memory that processes share, work that ends when a thread has done it, and faults.

Implements ``distserve.transfer.cuda_ipc.device.Device`` for the tests. Copies and computation are queues of work of
their own, as two streams of a card are; either can be held up.
"""

import os
import queue
import threading
import time
import warnings

import numpy as np
import torch

from distserve.core.errors import TransferError
from distserve.transfer import segment
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport
from distserve_kernels import copy_rows

LOST_STATUS = 70
"""Exit status of a process whose device is lost."""


class FakeEvent:
    def __init__(self, queue):
        self._queue = queue
        self._passed = threading.Event()

    def has_passed(self):
        if self._queue.broken:
            raise TransferError("the GPU has failed: illegal address")
        return self._passed.is_set()


class WorkQueue:
    """A stream: runs what it is given in order. Faults: ``delay`` before each piece (s), :meth:`hold`, ``broken``."""

    def __init__(self):
        self.delay = 0.0
        self.broken = False
        self.num_done = 0
        self._free = threading.Event()
        self._free.set()
        self._work = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self):
        self._free.clear()

    def go_on(self):
        self._free.set()

    def launch(self, work=None):
        event = FakeEvent(self)
        self._work.put((work, event))
        return event

    def _run(self):
        while True:
            work, event = self._work.get()
            time.sleep(self.delay)
            self._free.wait()
            if not self.broken:
                if work is not None:
                    work()
                    self.num_done += 1
                event._passed.set()
            del work, event  # what was copied from may be unmapped now


class FakeDevice:
    """One "card" named ``name``; two processes that give the same name share it."""

    def __init__(self, name="fake-0", reachable=()):
        self.name = name
        self.copies = WorkQueue()
        self.computation = WorkQueue()
        self.num_to_refuse = 0
        self.num_launched = 0
        self.prepared = set()
        self._reachable = {name, *reachable}

    def reaches(self, name):
        return name in self._reachable

    def allocate(self, num_bytes):
        fd, memory = segment.create("distserve-gpu", num_bytes)
        return fd, torch.frombuffer(memory, dtype=torch.uint8)

    def open(self, fd, num_bytes, name):
        assert name in self._reachable
        memory = segment.attach(fd, num_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch knows no read-only tensors
            return torch.frombuffer(memory, dtype=torch.uint8)

    def prepare(self, row_bytes):
        self.prepared.add(row_bytes)

    def copy(self, src, dst, rows):
        if self.num_to_refuse:
            self.num_to_refuse -= 1
            raise TransferError("copy not launched: out of memory")
        starts = np.stack((rows.src_starts, rows.dst_starts))
        assert rows.row_bytes in self.prepared, "copies must not wait for a compiler"
        assert (starts >= 0).all()
        last = (rows.num_planes - 1) * np.array([[rows.src_stride], [rows.dst_stride]]) + starts + rows.row_bytes
        assert (last.max(axis=1) <= [src.numel(), dst.numel()]).all()
        self.num_launched += 1
        strides = rows.src_stride, rows.dst_stride
        return self.copies.launch(
            lambda: copy_rows(src, dst, torch.from_numpy(starts), rows.row_bytes, rows.num_planes, *strides)
        )

    def mark(self):
        return self.computation.launch()

    mark_again = mark


class FakeGpuTransport(CudaIpcTransport):
    """The transport over a fake device, for a process of its own: its faults are methods, its end is the process's."""

    def __init__(self, layout, *, secret, clock, patience=20.0):
        self.device = FakeDevice()
        super().__init__(
            layout,
            device=self.device,
            secret=secret,
            clock=clock,
            on_lost=lambda error: os._exit(LOST_STATUS),
            patience=patience,
        )

    def hold(self, queue):
        getattr(self.device, queue).hold()

    def go_on(self, queue):
        getattr(self.device, queue).go_on()
