"""Pulls made of parts that end in any order, on any thread, also before the others were started."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.commands import Migrate
from distserve.core.events import Migrated
from distserve.transfer.joint import InstancePuller

MIGRATE = Migrate(5, ("r", 0), "source", (1,), (2,), 1, 0, math.inf)


class Rank:
    """Ends a pull when told to, at once if told before, and when cancelled; a cancelled one is over with the call."""

    def __init__(self, at_once: Migrated | None = None) -> None:
        self.at_once = at_once
        self.done = None
        self.was_cancelled = False

    def pull(self, migrate, done):
        assert migrate is MIGRATE
        self.done = done
        if self.at_once is not None:
            self.end(self.at_once)

    def cancel(self, pull_id):
        assert pull_id == 5
        if self.done is not None:
            self.was_cancelled = True
            self.end(Migrated(5, ok=False, reason="cancelled"))

    def end(self, event):
        done, self.done = self.done, None
        done(event)


@given(st.permutations(range(4)))
def test_all_good_is_reported_once_at_the_end_with_all_bytes(order):
    ranks, events = [Rank() for _ in range(4)], []
    InstancePuller(ranks).pull(MIGRATE, events.append)
    for rank in order:
        assert events == []
        ranks[rank].end(Migrated(5, ok=True, num_bytes=10 + rank))
    assert events == [Migrated(5, ok=True, num_bytes=46)]


@pytest.mark.parametrize("failing", range(3))
def test_the_first_failure_cancels_the_others_and_is_the_reason(failing):
    ranks, events = [Rank() for _ in range(3)], []
    InstancePuller(ranks).pull(MIGRATE, events.append)
    ranks[failing].end(Migrated(5, ok=False, reason="killed"))
    assert events == [Migrated(5, ok=False, reason="killed")]
    assert [rank.was_cancelled for rank in ranks] == [rank is not ranks[failing] for rank in ranks]


def test_a_failure_before_the_others_are_started_cancels_those_too():
    late, events = Rank(), []
    InstancePuller([Rank(Migrated(5, ok=False, reason="not connected")), late]).pull(MIGRATE, events.append)
    assert late.was_cancelled
    assert events == [Migrated(5, ok=False, reason="not connected")]


def test_parts_may_all_end_while_they_are_started():
    events = []
    InstancePuller([Rank(Migrated(5, ok=True)), Rank(Migrated(5, ok=True))]).pull(MIGRATE, events.append)
    assert events == [Migrated(5, ok=True)]


def test_a_part_that_is_slow_to_end_is_waited_for():
    """Its blocks may still be written until then."""

    class Slow(Rank):
        def cancel(self, pull_id):
            self.was_cancelled = True

    slow, quick, events = Slow(), Rank(), []
    InstancePuller([slow, quick]).pull(MIGRATE, events.append)
    quick.end(Migrated(5, ok=False, reason="killed"))
    assert slow.was_cancelled
    assert events == []
    slow.end(Migrated(5, ok=True, num_bytes=3))
    assert events == [Migrated(5, ok=False, reason="killed")]
