"""The few calls of NVIDIA's driver that allocate GPU memory other processes may map, by descriptor.

The driver's virtual memory management, not ``cudaIpcGetMemHandle``: there, memory whose owner ends while another
process reads it is undefined; here it lives until its last mapping and descriptor are gone, peers map it read-only,
and what travels is a descriptor, like that of a memfd. No library beside torch has it, so it is called through ctypes:
the driver's C interface is stable. See "Virtual Memory Management" in the CUDA driver API's reference.
"""

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any

from distserve.core.errors import ConfigError, TransferError

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_*
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression_type", c_ubyte),
        ("gpu_direct_rdma_capable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_metadata", c_void_p),
        ("flags", _AllocationFlags),
    )


class AccessDescription(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", _Location), ("flags", c_int))


_SIGNATURES = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProperties), c_int),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(AllocationProperties), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemExportToShareableHandle": (POINTER(c_int), c_uint64, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (POINTER(c_uint64), c_void_p, c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(AccessDescription), c_size_t),
}


def load_library() -> Any:
    """The driver's library; raises ConfigError if this machine has none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(
            f"no NVIDIA driver on this machine ({error}): instances run on GPUs only where there are any"
        ) from error


class Driver:
    """Physical memory of GPUs, and where it is mapped. ``device`` is the driver's number of a card in this process.

    Methods raise TransferError with the driver's own words. ``library`` has its functions (:func:`load_library`).
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = c_int
        self._call("cuInit", 0)

    def allocation_bytes(self, num_bytes: int, device: int) -> int:
        """Bytes that an allocation of ``num_bytes`` takes on ``device``."""
        granularity = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(granularity), byref(_properties(device)), _MINIMUM)
        return -(-num_bytes // granularity.value) * granularity.value

    def create(self, size: int, device: int) -> tuple[int, int]:
        """Allocate ``size`` bytes (of :meth:`allocation_bytes`): where they are mapped, writable, and a descriptor."""
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), size, byref(_properties(device)), 0)
        try:
            fd = c_int()
            self._call("cuMemExportToShareableHandle", byref(fd), handle, _FILE_DESCRIPTOR, 0)
            os.set_inheritable(fd.value, False)
            try:
                return self._map(handle.value, size, device, _READ_WRITE), fd.value
            except BaseException:
                os.close(fd.value)
                raise
        finally:
            self._call("cuMemRelease", handle)

    def open(self, fd: int, size: int, device: int) -> int:
        """Map ``size`` bytes behind another process's descriptor read-only into ``device``'s addresses."""
        handle = c_uint64()
        self._call("cuMemImportFromShareableHandle", byref(handle), fd, _FILE_DESCRIPTOR)
        try:
            return self._map(handle.value, size, device, _READ)
        finally:
            self._call("cuMemRelease", handle)

    def unmap(self, pointer: int, size: int) -> None:
        """End a mapping; the memory goes with its last one and its descriptors. No work under way may use it."""
        self._call("cuMemUnmap", pointer, size)
        self._call("cuMemAddressFree", pointer, size)

    def _map(self, handle: int, size: int, device: int, access: int) -> int:
        pointer = c_uint64()
        self._call("cuMemAddressReserve", byref(pointer), size, 0, 0, 0)
        try:
            self._call("cuMemMap", pointer, size, 0, handle, 0)
        except BaseException:
            self._call("cuMemAddressFree", pointer, size)
            raise
        try:
            description = AccessDescription(_Location(_ON_DEVICE, device), access)
            self._call("cuMemSetAccess", pointer, size, byref(description), 1)
        except BaseException:
            self.unmap(pointer.value, size)
            raise
        return pointer.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            text = c_char_p()
            self._library.cuGetErrorString(result, byref(text))
            raise TransferError(f"{name}: {(text.value or b'unknown error').decode()} ({result})")


def _properties(device: int) -> AllocationProperties:
    return AllocationProperties(
        type=_PINNED, requested_handle_types=_FILE_DESCRIPTOR, location=_Location(_ON_DEVICE, device)
    )
