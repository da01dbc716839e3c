"""Copies pieces between two pools, out of Python's way: the interpreter lock is free while bytes move."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from distserve.transfer.plan import Pieces

Bytes = NDArray[np.uint8]

_LONG_PIECE = 64 << 10
"""Bytes from which one library call per piece costs nothing beside the copy."""
_STAGE_BYTES = 256 << 10
"""Short pieces are gathered into, and scattered from, a buffer that stays in a core's own cache."""


def copy_pieces(src: Bytes, dst: Bytes, pieces: Pieces) -> int:
    """Copy every piece from ``src`` to ``dst`` (flat bytes) and return the number of bytes."""
    num_bytes = int(pieces[:, 2].sum())
    if num_bytes >= _LONG_PIECE * len(pieces):
        src_start, dst_start = src.ctypes.data, dst.ctypes.data
        for src_offset, dst_offset, length in pieces.tolist():
            ctypes.memmove(dst_start + dst_offset, src_start + src_offset, length)
        return num_bytes
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
        taken = np.take(src_units, src_index[rows], out=stage[: len(src_index[rows])], mode="clip")
        dst_units[dst_index[rows]] = taken
    return num_bytes


def _in_units(memory: Bytes, unit: int) -> NDArray[np.void]:
    return memory[: memory.size // unit * unit].view(np.dtype((np.void, unit)))
