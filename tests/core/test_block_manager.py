"""Blocks are conserved whatever happens to them, and a key never names a block that was written since."""

from itertools import takewhile

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from distserve.core.block_manager import BlockManager

NUM_BLOCKS = 12


class BlockManagerMachine(RuleBasedStateMachine):
    """Tables that own references, checked against a plain count of them and a plain note of contents."""

    tables = Bundle("tables")
    max_known: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, self.max_known)
        self.held: list[list[int]] = []
        self.kept: list[int] = []
        self.contents: dict[int, str] = {}
        """What each block was last labelled with, while nobody has been given it to write."""
        self.idle: list[int] = []
        """Free blocks of known content, the next to be evicted first."""

    def references(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for table in self.held:
            for block in table:
                counts[block] = counts.get(block, 0) + 1
        return counts

    def free(self) -> set[int]:
        return set(range(NUM_BLOCKS)) - {*self.references(), *self.kept}

    def note_idle(self, candidates: list[int]) -> None:
        free = self.free()
        self.idle += [block for block in candidates if block in free and block in self.contents]
        while self.max_known is not None and len(self.idle) > self.max_known:
            del self.contents[self.idle.pop(0)]

    @rule(target=tables, count=st.integers(0, 5))
    def allocate(self, count: int) -> list[int]:
        count = min(count, self.manager.num_free)
        unknown = self.free() - set(self.idle)
        num_evicted = max(0, count - len(unknown))
        evicted, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]
        table = self.manager.allocate(count)
        assert len(set(table)) == count
        assert set(table) - unknown == set(evicted), "unknown content goes first, then what was given up longest ago"
        for block in table:
            self.contents.pop(block, None)
        self.held.append(table)
        return table

    @precondition(lambda self: self.held)
    @rule(target=tables, table=tables)
    def fork(self, table: list[int]) -> list[int]:
        self.manager.share(table)
        copy = list(table)
        self.held.append(copy)
        return copy

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        self.manager.release(table)
        self.held = [other for other in self.held if other is not table]
        self.note_idle(table[::-1])

    @rule(table=tables, prompt=st.sampled_from("abc"), start=st.integers(0, 2))
    def label(self, table: list[int], prompt: str, start: int) -> None:
        keys = [f"{prompt}{start + index}" for index in range(len(table))]
        for index, block in enumerate(table):
            keys[index] = self.contents.get(block, keys[index])
        named = {key: block for block, key in self.contents.items()}
        labelled = self.manager.label(table, keys)
        for block, key in zip(table, keys, strict=True):
            if block in self.contents:
                assert block not in labelled
            elif key not in named or named[key] in self.idle:
                assert block in labelled
                if key in named:
                    self.idle.remove(named[key])
                    del self.contents[named[key]]
                self.contents[block] = key
                named[key] = block
            else:
                assert block not in labelled, "the block that is in use is the one that is found"

    @rule(target=tables, prompt=st.sampled_from("abc"), count=st.integers(1, 6))
    def find_and_claim(self, prompt: str, count: int) -> list[int]:
        keys = [f"{prompt}{index}" for index in range(count)]
        named = {key: block for block, key in self.contents.items()}
        table = self.manager.find(keys)
        assert table == [named[key] for key in takewhile(named.__contains__, keys)], "the longest run that is known"
        assert self.manager.num_idle(table) == len(self.free() & set(table))
        self.manager.claim(table)
        self.idle = [block for block in self.idle if block not in table]
        self.held.append(table)
        return table

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def forget(self, block: int) -> None:
        self.manager.forget([block])
        if self.contents.pop(block, None) is not None and block in self.idle:
            self.idle.remove(block)

    @precondition(lambda self: any(self.held))
    @rule()
    def hold(self) -> None:
        block = next(table for table in self.held if table)[0]
        self.manager.hold(block)
        self.kept.append(block)

    @precondition(lambda self: self.kept)
    @rule()
    def unhold(self) -> None:
        block = self.kept.pop()
        self.manager.unhold(block)
        if block not in self.kept:
            self.note_idle([block])

    @invariant()
    def blocks_are_free_or_held(self) -> None:
        counts = self.references()
        assert self.manager.num_free == len(self.free())
        for block, count in counts.items():
            assert self.manager.is_shared(block) == (count > 1)

    @invariant()
    def what_is_found_is_what_was_noted(self) -> None:
        for block, key in self.contents.items():
            assert self.manager.find([key]) == [block]


class BoundedBlockManagerMachine(BlockManagerMachine):
    """Of free blocks only so many are remembered, those given up last."""

    max_known = 3


TestBlockManager = BlockManagerMachine.TestCase
TestBoundedBlockManager = BoundedBlockManagerMachine.TestCase


def test_blocks_handed_out_are_distinct() -> None:
    manager = BlockManager(8)
    first = manager.allocate(5)
    manager.release(first[1:3])
    second = manager.allocate(5)
    assert len({*second, first[0], *first[3:]}) == 8


def test_of_two_tables_given_up_the_older_goes_first_from_its_tail() -> None:
    manager = BlockManager(4)
    old, new = manager.allocate(2), manager.allocate(2)
    manager.label(old, ["old0", "old1"])
    manager.label(new, ["new0", "new1"])
    manager.release(old)
    manager.release(new)
    assert manager.allocate(1) == [old[1]]
    assert manager.find(["old0", "old1"]) == [old[0]]
    assert set(manager.allocate(2)) == {old[0], new[1]}
    assert manager.find(["old0"]) == []
    assert manager.find(["new0", "new1"]) == [new[0]]
