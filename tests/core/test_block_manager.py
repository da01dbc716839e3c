"""Blocks are conserved whatever happens to them."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from distserve.core.block_manager import BlockManager


class BlockManagerMachine(RuleBasedStateMachine):
    """Tables that own references, checked against a plain count of them."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12)
        self.held: list[list[int]] = []
        self.num_left = 0
        self.left: dict[int, list[int]] = {}
        self.rewritten: set[tuple[int, int]] = set()
        self.kept: list[int] = []

    @rule(target=tables, count=st.integers(0, 5))
    def allocate(self, count: int) -> list[int]:
        table = self.manager.allocate(min(count, self.manager.num_free))
        self.rewritten |= {(whose, block) for whose in self.left for block in table}
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

    @rule(table=consumes(tables))
    def leave(self, table: list[int]) -> None:
        self.num_left += 1
        self.manager.leave(table, self.num_left)
        self.held = [other for other in self.held if other is not table]
        self.left[self.num_left] = table

    @precondition(lambda self: self.left)
    @rule(target=tables, data=st.data())
    def reclaim(self, data: st.DataObject) -> list[int]:
        whose = data.draw(st.sampled_from(sorted(self.left)))
        blocks = self.left.pop(whose)
        kept = self.manager.reclaim(blocks, whose)
        assert kept == blocks[: len(kept)]
        assert not self.rewritten.intersection((whose, block) for block in kept), "somebody wrote it meanwhile"
        self.held.append(kept)
        return kept

    @precondition(lambda self: any(self.held))
    @rule()
    def hold(self) -> None:
        block = next(table for table in self.held if table)[0]
        self.manager.hold(block)
        self.kept.append(block)

    @precondition(lambda self: self.kept)
    @rule()
    def unhold(self) -> None:
        self.manager.unhold(self.kept.pop())

    @invariant()
    def blocks_are_free_or_held(self) -> None:
        counts: dict[int, int] = {}
        for table in self.held:
            for block in table:
                counts[block] = counts.get(block, 0) + 1
        assert self.manager.num_free == 12 - len({*counts, *self.kept})
        for block, count in counts.items():
            assert self.manager.is_shared(block) == (count > 1)


TestBlockManager = BlockManagerMachine.TestCase


def test_blocks_handed_out_are_distinct() -> None:
    manager = BlockManager(8)
    first = manager.allocate(5)
    manager.release(first[1:3])
    second = manager.allocate(5)
    assert len({*second, first[0], *first[3:]}) == 8
