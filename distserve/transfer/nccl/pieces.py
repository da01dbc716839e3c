"""How a pull is cut into the pieces that NCCL sends one by one. Pure; both ends cut alike.

A piece is some blocks of a pull in some of its layers, keys and values: what one call of the pack kernel gathers.
Blocks that are ready travel first; the others by groups of layers, as the source's step passes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from distserve.core.config import KvLayout
from distserve.transfer.plan import token_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """``blocks`` index the pull's list of blocks, ``layers`` count within the layers that it moves.

    ``follows_step``: the blocks are complete only once the step that the pull names has passed the layers.
    """

    blocks: range
    layers: range
    num_bytes: int
    follows_step: bool


def cell_bytes(layout: KvLayout, heads: range) -> int:
    """Bytes of ``heads`` of one block in one layer, keys and values."""
    return 2 * layout.block_size * token_bytes(layout, heads)


def slot_bytes(layout: KvLayout, min_bytes: int) -> int:
    """Bytes that any piece of at least ``min_bytes`` fits into, whatever part of ``layout`` it is of."""
    return max(3 * min_bytes, cell_bytes(layout, range(layout.num_kv_heads)))


def cut(num_ready: int, num_blocks: int, num_layers: int, cell: int, min_bytes: int) -> tuple[Piece, ...]:
    """Cut ``num_blocks`` blocks of ``num_layers`` layers, ``cell`` bytes each; the first ``num_ready`` are ready.

    Every piece has at least ``min_bytes``, or is all of the ready blocks or all of the others; and fewer than
    ``3 * min_bytes``, or is a single cell. Pieces of the same blocks come in the order of their layers.
    """
    return (
        *_cut(range(num_ready), num_layers, cell, min_bytes, follows_step=False),
        *_cut(range(num_ready, num_blocks), num_layers, cell, min_bytes, follows_step=True),
    )


def _cut(blocks: range, num_layers: int, cell: int, min_bytes: int, *, follows_step: bool) -> Iterator[Piece]:
    if not blocks:
        return
    layer_bytes = len(blocks) * cell
    for layers in _even(range(num_layers), -(-min_bytes // layer_bytes)):
        # With several layers in a piece its layers are short of ``min_bytes``, and so the blocks stay together.
        for some in _even(blocks, -(-min_bytes // cell)) if len(layers) == 1 else (blocks,):
            yield Piece(some, layers, len(some) * len(layers) * cell, follows_step)


def _even(whole: range, at_least: int) -> Iterator[range]:
    """Cut ``whole`` into as many parts of ``at_least`` elements as it has, as equal as can be."""
    num_parts = max(1, len(whole) // at_least)
    for part in range(num_parts):
        yield whole[len(whole) * part // num_parts : len(whole) * (part + 1) // num_parts]
