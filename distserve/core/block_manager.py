"""Paged KV memory: which blocks are free, who shares the others, and what full blocks hold.

Knows block ids, reference counts and keys of content, neither sequences nor bytes. Invariants: every block is either
free, exactly once, or referenced or held, so the numbers of both kinds add up to ``num_blocks``; a key names one
block, which holds what the key stands for until it is handed out to be written.

A free block whose content is known can be found until it is needed: blocks of unknown content go first, then the one
that was given up longest ago, of one table its last (the head of a prompt is what others have in common with it).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from distserve.core.prefix import BlockKey


class BlockManager:
    """Hands out blocks ``0..num_blocks-1``, counts references to them and finds them by content."""

    def __init__(self, num_blocks: int, max_known: int | None = None) -> None:
        """At most ``max_known`` free blocks are remembered by their content; None: all."""
        self.num_blocks = num_blocks
        self._max_known = num_blocks if max_known is None else max_known
        self._shares: dict[int, int] = {}
        """References beyond the first: few blocks have any, so that whole tables are taken and given back at once."""
        self._holds: dict[int, int] = {}
        self._waiting: set[int] = set()
        """Held blocks that nobody references any more."""
        # A stack: the block freed last is reused first, while it may still be in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._keys: dict[int, BlockKey] = {}
        """What blocks hold, where that is known."""
        self._blocks: dict[BlockKey, int] = {}
        """The same, the other way round."""
        self._known: OrderedDict[int, None] = OrderedDict()
        """Free blocks of known content, the least recently used first; the other free ones are in ``_free``."""
        self._fewest_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody references."""
        return len(self._free) + len(self._known)

    @property
    def peak_used(self) -> int:
        """The most blocks that were in use at once."""
        return self.num_blocks - self._fewest_free

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, each with one reference. The caller has checked :attr:`num_free`."""
        free = self._free
        if count > len(free):
            self._evict(count - len(free))
        assert 0 <= count <= len(free), "allocation was not checked against num_free"
        if count == 0:
            return []
        taken = free[-count:]
        taken.reverse()
        del free[-count:]
        self._fewest_free = min(self._fewest_free, self.num_free)
        return taken

    def _evict(self, count: int) -> None:
        """Forget what the ``count`` least recently used of the known free blocks hold."""
        assert count <= len(self._known), "allocation was not checked against num_free"
        for block in list(islice(self._known, count)):
            del self._known[block]
            del self._blocks[self._keys.pop(block)]
            self._free.append(block)

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
                self.release([block])

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference from each block of a table, the last block first; the last reference frees it."""
        keys, known, free, shares, holds = self._keys, self._known, self._free, self._shares, self._holds
        if not (shares or holds) and (not keys or keys.keys().isdisjoint(blocks)):
            free += blocks
        else:
            for block in reversed(blocks):
                if block in shares:
                    self._unshare(block)
                elif block in holds:
                    assert block not in self._waiting, "block released twice"
                    self._waiting.add(block)
                elif block in keys:
                    assert block not in known, "block released twice"
                    known[block] = None
                else:
                    free.append(block)
            if len(known) > self._max_known:
                self._evict(len(known) - self._max_known)
        assert self.num_free <= self.num_blocks, "blocks released twice"

    def _unshare(self, block: int) -> None:
        others = self._shares.pop(block)
        if others > 1:
            self._shares[block] = others - 1

    # -- content -------------------------------------------------------------------------------------------------------

    def label(self, blocks: Iterable[int], keys: Iterable[BlockKey]) -> list[int]:
        """Note what referenced blocks hold, so that they are found; they are written no more while anybody has them.

        Returns those that are found under their key now: of two blocks with one content the first in use stays.
        """
        labelled = []
        for block, key in zip(blocks, keys, strict=True):
            if block in self._keys:
                assert self._keys[block] == key, "a block's content changed under its key"
                continue
            other = self._blocks.get(key)
            if other is not None and other not in self._known:
                continue
            if other is not None:
                self.forget([other])
            self._keys[block] = key
            self._blocks[key] = block
            labelled.append(block)
        return labelled

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks that hold what the keys stand for, up to the first that is nowhere; :meth:`claim` takes them."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks found count as free: those a claim takes from :attr:`num_free`."""
        known = self._known
        return sum(block in known for block in blocks) if known else 0

    def claim(self, blocks: Iterable[int]) -> None:
        """Take a reference to each block that was found."""
        for block in blocks:
            assert block in self._keys, "only what is known can be found"
            if block in self._known:
                del self._known[block]
            elif block in self._waiting:
                self._waiting.remove(block)
            else:
                self._shares[block] = self._shares.get(block, 0) + 1
        self._fewest_free = min(self._fewest_free, self.num_free)

    def forget(self, blocks: Iterable[int]) -> None:
        """The blocks do not hold what was noted, or nobody is to find them any more."""
        for block in blocks:
            key = self._keys.pop(block, None)
            if key is None:
                continue
            del self._blocks[key]
            if block in self._known:
                del self._known[block]
                self._free.append(block)
