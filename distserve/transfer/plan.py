"""What to copy where: block lists become pieces of contiguous bytes. Pure functions of layouts and block ids.

A layer's keys, or its values, are a *plane*: ``num_blocks`` blocks in a row. All planes of a pool are alike and
follow one another, so a pull is planned once, for one plane, and repeated with a stride.

Between ranks of different shapes a :class:`Part` of a block moves: some layers, which are planes, and some heads,
which are a span of every token of a block (a *row*), since a block is ``[P, K, D]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError

Pieces = NDArray[np.int64]
"""``[num_pieces, 3]`` rows (src_offset, dst_offset, num_bytes), in bytes from the start of a plane on either side."""

Starts = NDArray[np.int64]
"""``[num_rows]`` offsets of equally long rows, in bytes from the start of a plane."""


@dataclass(frozen=True, slots=True)
class Part:
    """The layers and heads of a source rank's KV that go to a destination rank; each side counts within its own.

    ``src_layers`` and ``dst_layers`` are equally long ranges, and so are the heads'. ``src_num_layers`` and
    ``src_num_kv_heads`` are all that the source has, by which its layout is known before it is asked.
    """

    src_num_layers: int
    src_num_kv_heads: int
    src_layers: range
    src_heads: range
    dst_layers: range
    dst_heads: range

    @property
    def num_layers(self) -> int:
        """Layers that move."""
        return len(self.src_layers)

    def source_layout(self, ours: KvLayout) -> KvLayout:
        """How the source's KV must be laid out for the part to fit ``ours``; its ``num_blocks`` may be any."""
        return replace(ours, num_layers=self.src_num_layers, num_kv_heads=self.src_num_kv_heads)


def whole(layout: KvLayout) -> Part:
    """All of a source whose blocks are the same bytes as those of ``layout``."""
    layers, heads = range(layout.num_layers), range(layout.num_kv_heads)
    return Part(layout.num_layers, layout.num_kv_heads, layers, heads, layers, heads)


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


def token_bytes(layout: KvLayout, heads: range) -> int:
    """Bytes of ``heads`` of one token in a plane."""
    return layout.block_bytes // layout.block_size // layout.num_kv_heads * len(heads)


def plane_pieces(
    src_blocks: Sequence[int], dst_blocks: Sequence[int], src: KvLayout, dst: KvLayout, part: Part | None = None
) -> Pieces:
    """Pieces that move ``part`` (default: all) of block ``src_blocks[i]`` to ``dst_blocks[i]`` within a plane.

    Neighbours that follow each other on both sides share a piece. Raises TransferError if the lists differ in length
    or name blocks outside of the pools.
    """
    part = part or whole(dst)
    check_blocks(src_blocks, dst_blocks, src, dst)
    per_token = _moves_by_token(src, dst, part)
    src_starts, row_bytes = _row_starts(src_blocks, src, part.src_heads, per_token=per_token)
    dst_starts, _ = _row_starts(dst_blocks, dst, part.dst_heads, per_token=per_token)
    return _merged(src_starts, dst_starts, row_bytes)


def row_bytes(src: KvLayout, dst: KvLayout, part: Part) -> int:
    """Bytes of the rows of which pieces are made: a block's keys or values, or the part's heads of one token."""
    return token_bytes(dst, part.dst_heads) if _moves_by_token(src, dst, part) else dst.block_bytes


def stream_pieces(blocks: Sequence[int], layout: KvLayout, heads: range) -> Pieces:
    """Pieces that move ``heads`` of ``blocks`` of a plane into one run of bytes, in order: what a wire carries.

    The run is the same for every layout and place the blocks have, so that either end plans with its own alone.
    """
    starts, row_bytes = _row_starts(blocks, layout, heads, per_token=_is_split(layout, heads))
    return _merged(starts, np.arange(len(starts), dtype=np.int64) * row_bytes, row_bytes)


def check_blocks(src_blocks: Sequence[int], dst_blocks: Sequence[int], src: KvLayout, dst: KvLayout) -> None:
    """Raise TransferError if the lists differ in length or name blocks outside of the pools."""
    if len(src_blocks) != len(dst_blocks):
        raise TransferError(f"{len(src_blocks)} source blocks cannot go into {len(dst_blocks)} destination blocks")
    for side, blocks, layout in (("source", src_blocks, src), ("destination", dst_blocks, dst)):
        if not blocks:
            continue
        low, high = min(blocks), max(blocks)
        if low < 0 or high >= layout.num_blocks:
            raise TransferError(f"{side} blocks {low}..{high} are not all within 0..{layout.num_blocks - 1}")


def portions(pieces: Pieces, max_bytes: int) -> list[Pieces]:
    """Cut ``pieces`` in order at every multiple of ``max_bytes`` of their bytes.

    Where the cuts lie depends on how many bytes there are and not on how they are divided into pieces, so both ends
    of a wire cut alike.
    """
    if len(pieces) == 0:
        return []
    ends = np.cumsum(pieces[:, 2])
    num_bytes = int(ends[-1])
    if num_bytes <= max_bytes:
        return [pieces]
    starts = ends - pieces[:, 2]
    cuts = np.arange(0, num_bytes, max_bytes)
    bounds = np.unique(np.concatenate((starts, cuts)))
    of = np.searchsorted(ends, bounds, side="right")
    cut = pieces[of]
    cut[:, :2] += (bounds - starts[of])[:, None]
    cut[:, 2] = np.diff(bounds, append=num_bytes)
    return np.split(cut, np.searchsorted(bounds, cuts[1:]))


def _moves_by_token(src: KvLayout, dst: KvLayout, part: Part) -> bool:
    return _is_split(src, part.src_heads) or _is_split(dst, part.dst_heads)


def _is_split(layout: KvLayout, heads: range) -> bool:
    return len(heads) != layout.num_kv_heads


def _row_starts(blocks: Sequence[int], layout: KvLayout, heads: range, *, per_token: bool) -> tuple[Starts, int]:
    """Where the rows of ``blocks`` start, in order, and the bytes of a row: a whole block, or a token's ``heads``."""
    starts = np.asarray(blocks, dtype=np.int64) * layout.block_bytes
    if not per_token:
        return starts, layout.block_bytes
    tokens = np.arange(layout.block_size, dtype=np.int64) * (layout.block_bytes // layout.block_size)
    first_head = token_bytes(layout, range(heads.start))
    return (starts[:, None] + (tokens + first_head)).ravel(), token_bytes(layout, heads)


def _merged(src_starts: Starts, dst_starts: Starts, row_bytes: int) -> Pieces:
    """Rows as pieces, as few as can be."""
    if len(src_starts) == 0:
        return np.empty((0, 3), dtype=np.int64)
    jumps = np.flatnonzero((np.diff(src_starts) != row_bytes) | (np.diff(dst_starts) != row_bytes)) + 1
    first = np.concatenate((np.zeros(1, dtype=np.int64), jumps))
    pieces = np.empty((len(first), 3), dtype=np.int64)
    pieces[:, 0], pieces[:, 1] = src_starts[first], dst_starts[first]
    pieces[:, 2] = np.diff(first, append=len(src_starts)) * row_bytes
    return pieces
