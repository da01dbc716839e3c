"""Paged KV memory: which blocks are free, and who shares the others.

Knows block ids and reference counts only, neither sequences nor bytes. Invariant: every block is either in the free
list, exactly once, or referenced or held, so the numbers of both kinds add up to ``num_blocks``.
"""

from collections.abc import Collection, Iterable
from itertools import takewhile


class BlockManager:
    """Hands out blocks ``0..num_blocks-1`` and counts references to them."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._shares: dict[int, int] = {}
        """References beyond the first: few blocks have any, so that whole tables are taken and given back at once."""
        self._holds: dict[int, int] = {}
        self._waiting: set[int] = set()
        """Held blocks that nobody references any more."""
        self._left: dict[int, int] = {}
        """Free blocks that nobody has written since they were left, and by whom."""
        # A stack: the block freed last is reused first, while it may still be in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._fewest_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody references."""
        return len(self._free)

    @property
    def peak_used(self) -> int:
        """The most blocks that were in use at once."""
        return self.num_blocks - self._fewest_free

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, each with one reference. The caller has checked :attr:`num_free`."""
        free = self._free
        assert 0 <= count <= len(free), "allocation was not checked against num_free"
        if count == 0:
            return []
        taken = free[-count:]
        taken.reverse()
        del free[-count:]
        self._fewest_free = min(self._fewest_free, len(free))
        if self._left:
            for block in taken:
                self._left.pop(block, None)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block (a fork)."""
        for block in blocks:
            self._shares[block] = self._shares.get(block, 0) + 1

    def is_shared(self, block: int) -> bool:
        """Whether writing the block would change what another sequence reads: then copy it first."""
        return block in self._shares

    @property
    def has_shared(self) -> bool:
        """Whether any block is shared."""
        return bool(self._shares)

    def hold(self, block: int) -> None:
        """Keep a referenced block from being reused until :meth:`unhold`, without sharing it.

        A copy that a queued step will make still has to read its source, even if nobody references that any more.
        """
        self._holds[block] = self._holds.get(block, 0) + 1

    def unhold(self, block: int) -> None:
        """End one :meth:`hold`; the block is free if nobody references it."""
        self._holds[block] -= 1
        if self._holds[block] == 0:
            del self._holds[block]
            if block in self._waiting:
                self._waiting.remove(block)
                self._free.append(block)

    def release(self, blocks: Collection[int]) -> None:
        """Drop a reference from each block; the last one frees it."""
        if self._shares or self._holds:
            for block in blocks:
                self._release(block)
            return
        self._free += blocks
        assert len(self._free) <= self.num_blocks, "blocks released twice"

    def leave(self, blocks: Collection[int], whose: int) -> None:
        """Release blocks whose content ``whose`` may want back; see :meth:`reclaim`."""
        for block in blocks:
            if block not in self._shares and block not in self._holds:
                self._left[block] = whose
        self.release(blocks)

    def reclaim(self, blocks: Iterable[int], whose: int) -> list[int]:
        """Take back blocks that were left, up to the first that was not or has been handed out since.

        Their content is as it was. The answer has one reference to each.
        """
        kept = list(takewhile(lambda block: self._left.get(block) == whose, blocks))
        for block in kept:
            del self._left[block]
        if kept:
            taken = set(kept)
            self._free = [block for block in self._free if block not in taken]
            self._fewest_free = min(self._fewest_free, len(self._free))
        return kept

    def _release(self, block: int) -> None:
        others = self._shares.pop(block, 0)
        if others > 1:
            self._shares[block] = others - 1
        elif others == 0 and block in self._holds:
            assert block not in self._waiting, "block released twice"
            self._waiting.add(block)
        elif others == 0:
            self._free.append(block)
