"""What to copy where: block lists become pieces of contiguous bytes. Pure functions of layouts and block ids.

A piece is a row ``(src_offset, dst_offset, num_bytes)`` of byte offsets into the two pools.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError

Runs = NDArray[np.int64]
"""``[num_runs, 3]`` rows (first source block, first destination block, number of blocks)."""
Pieces = NDArray[np.int64]
"""``[num_pieces, 3]`` rows (src_offset, dst_offset, num_bytes)."""


def layout_difference(ours: KvLayout, theirs: KvLayout) -> str | None:
    """Say in what two layouts differ such that their blocks are not the same bytes, or None if they are."""
    differing = [
        f.name for f in fields(KvLayout) if f.name != "num_blocks" and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    if not differing:
        return None
    return ", ".join(f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here" for name in differing)


def block_runs(src_blocks: Sequence[int], dst_blocks: Sequence[int], num_src: int, num_dst: int) -> Runs:
    """Join neighbours: consecutive pairs whose blocks follow each other on both sides become one run.

    Raises TransferError if the lists differ in length or name blocks outside pools of ``num_src`` and ``num_dst``.
    """
    if len(src_blocks) != len(dst_blocks):
        raise TransferError(f"{len(src_blocks)} source blocks cannot go into {len(dst_blocks)} destination blocks")
    if not src_blocks:
        return np.empty((0, 3), dtype=np.int64)
    pairs = np.array((src_blocks, dst_blocks), dtype=np.int64)
    for side, blocks, num_blocks in (("source", pairs[0], num_src), ("destination", pairs[1], num_dst)):
        if blocks.min() < 0 or blocks.max() >= num_blocks:
            raise TransferError(f"{side} blocks {blocks.min()}..{blocks.max()} are not all within 0..{num_blocks - 1}")
    follows = (pairs[:, 1:] - pairs[:, :-1] == 1).all(axis=0)
    starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    runs = np.empty((len(starts), 3), dtype=np.int64)
    runs[:, :2] = pairs[:, starts].T
    runs[:-1, 2] = starts[1:] - starts[:-1]
    runs[-1, 2] = len(src_blocks) - starts[-1]
    return runs


def layer_pieces(runs: Runs, src: KvLayout, dst: KvLayout, first_layer: int, end_layer: int) -> Pieces:
    """Pieces that move ``runs`` of layers ``[first_layer, end_layer)``, keys and values, in memory order of layers.

    The layouts may differ in ``num_blocks`` only.
    """
    planes = np.arange(2 * first_layer, 2 * end_layer, dtype=np.int64)[:, None]
    pieces = np.empty((planes.shape[0], runs.shape[0], 3), dtype=np.int64)
    pieces[:, :, 0] = (planes * src.num_blocks + runs[:, 0]) * src.block_bytes
    pieces[:, :, 1] = (planes * dst.num_blocks + runs[:, 1]) * src.block_bytes
    pieces[:, :, 2] = runs[:, 2] * src.block_bytes
    return pieces.reshape(-1, 3)


def batches(pieces: Pieces, max_bytes: int) -> list[Pieces]:
    """Cut ``pieces`` in order into batches of about ``max_bytes``, each at least one piece.

    A piece longer than ``max_bytes`` is cut too, so no batch exceeds twice that.
    """
    if len(pieces) == 0:
        return []
    if pieces[:, 2].sum() <= max_bytes:
        return [pieces]
    if pieces[:, 2].max() > max_bytes:
        pieces = _cut(pieces, max_bytes)
    ends = np.cumsum(pieces[:, 2])
    cuts = np.searchsorted(ends, np.arange(max_bytes, ends[-1], max_bytes), side="left") + 1
    return [batch for batch in np.split(pieces, np.unique(cuts)) if batch.size]


def _cut(pieces: Pieces, max_bytes: int) -> Pieces:
    """Cut pieces longer than ``max_bytes``."""
    num_parts = -(-pieces[:, 2] // max_bytes)
    part = np.arange(num_parts.sum()) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    cut = np.repeat(pieces, num_parts, axis=0)
    skipped = part * max_bytes
    cut[:, :2] += skipped[:, None]
    cut[:, 2] = np.minimum(cut[:, 2] - skipped, max_bytes)
    return cut
