"""What to copy where: block lists become pieces of contiguous bytes. Pure functions of layouts and block ids.

A layer's keys, or its values, are a *plane*: ``num_blocks`` blocks in a row. All planes of a pool are alike and
follow one another, so a pull is planned once, for one plane, and repeated with a stride.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError

Pieces = NDArray[np.int64]
"""``[num_pieces, 3]`` rows (src_offset, dst_offset, num_bytes), in bytes from the start of a plane on either side."""


def layout_difference(ours: KvLayout, theirs: KvLayout) -> str | None:
    """Say in what two layouts differ such that their blocks are not the same bytes, or None if they are."""
    differing = [
        f.name for f in fields(KvLayout) if f.name != "num_blocks" and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    if not differing:
        return None
    return ", ".join(f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here" for name in differing)


def plane_bytes(layout: KvLayout) -> int:
    """Bytes of a plane: from one layer's keys to its values, and on to the next layer's keys."""
    return layout.num_blocks * layout.block_bytes


def plane_pieces(src_blocks: Sequence[int], dst_blocks: Sequence[int], src: KvLayout, dst: KvLayout) -> Pieces:
    """Pieces that move block ``src_blocks[i]`` to ``dst_blocks[i]`` within a plane.

    Neighbours whose blocks follow each other on both sides share a piece. The layouts may differ in ``num_blocks``
    only. Raises TransferError if the lists differ in length or name blocks outside of the pools.
    """
    if len(src_blocks) != len(dst_blocks):
        raise TransferError(f"{len(src_blocks)} source blocks cannot go into {len(dst_blocks)} destination blocks")
    if not src_blocks:
        return np.empty((0, 3), dtype=np.int64)
    for side, blocks, layout in (("source", src_blocks, src), ("destination", dst_blocks, dst)):
        low, high = min(blocks), max(blocks)
        if low < 0 or high >= layout.num_blocks:
            raise TransferError(f"{side} blocks {low}..{high} are not all within 0..{layout.num_blocks - 1}")
    pairs = np.array((src_blocks, dst_blocks), dtype=np.int64)
    steps = pairs[:, 1:] - pairs[:, :-1]
    jumps = np.flatnonzero((steps[0] != 1) | (steps[1] != 1)) + 1
    pieces = np.empty((len(jumps) + 1, 3), dtype=np.int64)
    pieces[0] = (*pairs[:, 0], len(src_blocks))
    pieces[1:, :2] = pairs[:, jumps].T
    # A piece ends where the next one starts: first the position of the end, then the length.
    pieces[1:, 2] = len(src_blocks)
    pieces[:-1, 2] = jumps
    pieces[1:, 2] -= jumps
    pieces *= src.block_bytes
    return pieces


def portions(pieces: Pieces, max_bytes: int) -> list[Pieces]:
    """Cut ``pieces`` in order into portions of about ``max_bytes``, each at least one piece.

    A piece longer than ``max_bytes`` is cut too, so no portion reaches twice that.
    """
    if len(pieces) == 0:
        return []
    if pieces[:, 2].sum() <= max_bytes:
        return [pieces]
    if pieces[:, 2].max() > max_bytes:
        pieces = _cut(pieces, max_bytes)
    ends = np.cumsum(pieces[:, 2])
    cuts = np.searchsorted(ends, np.arange(max_bytes, ends[-1], max_bytes), side="left") + 1
    return [portion for portion in np.split(pieces, np.unique(cuts)) if portion.size]


def _cut(pieces: Pieces, max_bytes: int) -> Pieces:
    """Cut pieces longer than ``max_bytes``."""
    num_parts = -(-pieces[:, 2] // max_bytes)
    part = np.arange(num_parts.sum()) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    cut = np.repeat(pieces, num_parts, axis=0)
    skipped = part * max_bytes
    cut[:, :2] += skipped[:, None]
    cut[:, 2] = np.minimum(cut[:, 2] - skipped, max_bytes)
    return cut
