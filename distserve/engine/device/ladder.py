"""The batch sizes that decode steps are captured for."""

from bisect import bisect_left
from collections.abc import Sequence


def make_ladder(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two up to ``max_batch_size``, and that itself: graphs are few, at most half of a batch is padding."""
    assert max_batch_size > 0
    rungs = [1]
    while rungs[-1] < max_batch_size:
        rungs.append(min(2 * rungs[-1], max_batch_size))
    return tuple(rungs)


def rung_for(rungs: Sequence[int], batch_size: int) -> int | None:
    """The smallest of the ascending ``rungs`` that holds a batch; None if it is beyond the ladder."""
    place = bisect_left(rungs, batch_size)
    return rungs[place] if place < len(rungs) else None
