"""What is asked of NVIDIA's driver, and in which order: of one that only notes it. The calls themselves need a card."""

import ctypes
import gc
import os
from pathlib import Path

import pytest

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.cuda_ipc import driver
from distserve.transfer.cuda_ipc.cuda import CudaDevice
from distserve.transfer.cuda_ipc.driver import AccessDescription, AllocationProperties, Driver

GRANULARITY = 2 << 20
HANDLE, ADDRESS = 0xABC, 0x7F00_0000_0000


class FakeLibrary:
    """Notes every call but the error texts; ``failing`` returns an error."""

    def __init__(self, failing=""):
        self.calls = []
        self.failing = failing
        self.access = None
        for name in driver._SIGNATURES:
            setattr(self, name, self._function(name))

    def _function(self, name):
        def call(*arguments):
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of memory"
                return 0
            self.calls.append(name)
            if name == self.failing:
                return 2
            match name:
                case "cuMemGetAllocationGranularity":
                    arguments[0]._obj.value = GRANULARITY
                case "cuMemCreate" | "cuMemImportFromShareableHandle":
                    arguments[0]._obj.value = HANDLE
                case "cuMemExportToShareableHandle":
                    arguments[0]._obj.value = os.open("/dev/null", os.O_RDONLY)
                case "cuMemAddressReserve":
                    arguments[0]._obj.value = ADDRESS
                case "cuMemSetAccess":
                    self.access = arguments[2]._obj.flags
            return 0

        return call

    def left(self):
        """How many of each thing were made and not given back."""
        count = self.calls.count
        made = count("cuMemCreate") + count("cuMemImportFromShareableHandle")
        return (
            made - count("cuMemRelease"),
            count("cuMemAddressReserve") - count("cuMemAddressFree"),
            count("cuMemMap") - count("cuMemUnmap"),
        )


def descriptors():
    """Those open, without what garbage still holds. Other tests' threads may close some of theirs at any time."""
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_structures_are_as_large_as_the_drivers():
    """CUmemAllocationProp and CUmemAccessDesc of cuda.h, on 64 bits."""
    assert ctypes.sizeof(AllocationProperties) == 32
    assert AllocationProperties.location.offset == 8
    assert AllocationProperties.win32_metadata.offset == 16
    assert ctypes.sizeof(AccessDescription) == 12


def test_memory_is_allocated_mapped_for_writing_and_exported():
    library = FakeLibrary()
    cuda = Driver(library)
    size = cuda.allocation_bytes(GRANULARITY + 1, 0)
    assert size == 2 * GRANULARITY
    pointer, fd = cuda.create(size, 0)
    assert pointer == ADDRESS
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert library.access == 3
    assert library.left() == (0, 1, 1), "the mapping keeps the memory, the handle is not needed any more"
    cuda.unmap(pointer, size)
    assert library.left() == (0, 0, 0)


def test_a_peers_memory_is_mapped_for_reading_only():
    library = FakeLibrary()
    cuda = Driver(library)
    assert cuda.open(5, GRANULARITY, 0) == ADDRESS
    assert library.access == 1
    assert library.left() == (0, 1, 1)


@pytest.mark.parametrize(
    "failing", ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
)
def test_an_allocation_that_fails_leaves_nothing_and_says_why(failing):
    library = FakeLibrary(failing)
    cuda, before = Driver(library), descriptors()
    with pytest.raises(TransferError, match=rf"{failing}: out of memory \(2\)"):
        cuda.create(GRANULARITY, 0)
    assert descriptors() <= before
    made = library.calls.count("cuMemCreate") - (failing == "cuMemCreate")
    assert library.calls.count("cuMemRelease") == made
    assert library.calls.count("cuMemAddressFree") == library.calls.count("cuMemAddressReserve") - (
        failing == "cuMemAddressReserve"
    )
    assert library.calls.count("cuMemUnmap") == library.calls.count("cuMemMap") - (failing == "cuMemMap")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_card_one_sentence_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"GPU 0 needs a torch built for CUDA|no GPU 0: torch finds no NVIDIA card"):
        CudaDevice(0)
    with pytest.raises(ConfigError, match="no NVIDIA driver on this machine"):
        driver.load_library()
