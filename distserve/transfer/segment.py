"""Anonymous shared memory: a file descriptor without a name, which vanishes with the last process that refers to it.

So nothing is left behind whenever and however processes die. The file is sealed: its size is fixed, which keeps
readers from bus errors, and peers cannot map it writable, which keeps the owner's KV cache its own.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

from distserve.core.errors import TransferError

_F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; not in Python's fcntl module before 3.13
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # <linux/mman.h>, since Linux 5.14
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
_POPULATE_BYTES = 8 << 20
"""Populated per system call: Python holds its lock meanwhile, a few milliseconds of other threads' time."""


def create(name: str, num_bytes: int) -> tuple[int, mmap.mmap]:
    """Allocate ``num_bytes`` of zeroed shared memory, in huge pages where the system allows, and all of it at once.

    Page faults then never fall into a request's time, and too large a pool fails here rather than under load. Returns
    the descriptor to hand to peers and the owner's writable mapping. Raises TransferError if the memory is not there.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        _advise_huge(memory)
        _populate(memory)
    except OSError as error:
        os.close(fd)
        raise TransferError(f"cannot allocate {num_bytes} bytes of shared memory for KV: {error}") from error
    return fd, memory


def attach(fd: int, num_bytes: int) -> mmap.mmap:
    """Map a peer's memory for reading, page tables included, so that no pull pays for faults.

    Raises TransferError unless it is sealed and at least ``num_bytes`` long.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        size = os.fstat(fd).st_size
        if not sealed or size < num_bytes:
            raise TransferError(f"peer's memory is {size} bytes (sealed: {bool(sealed)}), not {num_bytes} sealed ones")
        memory = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise TransferError(f"cannot map the peer's memory: {error}") from error
    _advise_huge(memory)
    # Older kernels cannot; the first pulls are slower there.
    with contextlib.suppress(OSError):
        for start, length in _portions(num_bytes):
            memory.madvise(_MADV_POPULATE_READ, start, length)
    return memory


def _advise_huge(memory: mmap.mmap) -> None:
    # Only an advice: kernels without transparent huge pages for shared memory refuse it.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _populate(memory: mmap.mmap) -> None:
    for start, length in _portions(len(memory)):
        try:
            memory.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # An older kernel: touch every page by hand.
            memory[start : start + length] = bytes(length)


def _portions(num_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_bytes, _POPULATE_BYTES):
        yield start, min(_POPULATE_BYTES, num_bytes - start)
