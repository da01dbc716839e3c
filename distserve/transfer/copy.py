"""Copies pieces between two pools, out of Python's way: the interpreter lock is free while bytes move.

The work is a page of C (``copy.c``), built when the package is installed. Where it could not be built, numpy does
the same at about half the speed for scattered blocks.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distserve.transfer.plan import Pieces

Bytes = NDArray[np.uint8]

_CACHED_BYTES = 64 << 20
"""Destinations up to this size are likely to be in a processor's caches: it pays to write into those."""
_LONG_PIECE = 64 << 10
"""Bytes from which one library call per piece costs nothing beside the copy."""
_STAGE_BYTES = 256 << 10
"""Short pieces are gathered into, and scattered from, a buffer that stays in a core's own cache."""


def _load() -> ctypes.CDLL | None:
    candidates = (Path(__file__).with_name(f"_copy{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.distserve_copy_pieces.argtypes = [pointer, pointer, pointer, *[number] * 4, ctypes.c_int32]
    library.distserve_copy_pieces.restype = None
    return library


_library = _load()


def copy_pieces(src: Bytes, dst: Bytes, pieces: Pieces, planes: range, src_stride: int, dst_stride: int) -> None:
    """Copy every piece of each of ``planes`` from ``src`` to ``dst`` (flat bytes).

    Plane ``i`` starts ``i`` strides into either memory. There is at least one piece; pieces lie within both memories
    and do not overlap in ``dst``.
    """
    if _library is None:
        copy_pieces_with_numpy(src, dst, pieces, planes, src_stride, dst_stride)
        return
    assert pieces.flags.c_contiguous
    assert pieces.dtype == np.int64
    assert planes.step == 1
    _library.distserve_copy_pieces(
        src.ctypes.data + planes.start * src_stride,
        dst.ctypes.data + planes.start * dst_stride,
        pieces.ctypes.data,
        len(pieces),
        len(planes),
        src_stride,
        dst_stride,
        dst.size > _CACHED_BYTES,
    )


def copy_pieces_with_numpy(
    src: Bytes, dst: Bytes, pieces: Pieces, planes: range, src_stride: int, dst_stride: int
) -> None:
    """Do what :func:`copy_pieces` does without native code."""
    in_long_pieces = int(pieces[:, 2].sum()) >= _LONG_PIECE * len(pieces)
    copy_plane = _copy_long if in_long_pieces else _copy_short
    for plane in planes:
        copy_plane(src[plane * src_stride :], dst[plane * dst_stride :], pieces)


def _copy_long(src: Bytes, dst: Bytes, pieces: Pieces) -> None:
    src_start, dst_start = src.ctypes.data, dst.ctypes.data
    for src_offset, dst_offset, length in pieces.tolist():
        ctypes.memmove(dst_start + dst_offset, src_start + src_offset, length)


def _copy_short(src: Bytes, dst: Bytes, pieces: Pieces) -> None:
    # The largest unit of which all offsets and lengths are multiples: a block, if blocks are what is copied.
    unit = int(np.gcd.reduce(pieces, axis=None))
    lengths = pieces[:, 2] // unit
    part = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    src_index = np.repeat(pieces[:, 0] // unit, lengths) + part
    dst_index = np.repeat(pieces[:, 1] // unit, lengths) + part
    src_units, dst_units = _in_units(src, unit), _in_units(dst, unit)
    per_stage = max(1, _STAGE_BYTES // unit)
    stage = np.empty(min(per_stage, len(part)), dtype=src_units.dtype)
    for first in range(0, len(part), per_stage):
        rows = slice(first, first + per_stage)
        dst_units[dst_index[rows]] = np.take(src_units, src_index[rows], out=stage[: len(part[rows])], mode="clip")


def _in_units(memory: Bytes, unit: int) -> NDArray[np.void]:
    return memory[: memory.size // unit * unit].view(np.dtype((np.void, unit)))
