"""Steps on their way through an instance's pipeline stages, where nobody knows beforehand when a stage will be over.

:mod:`simulator.engine` works a pipeline out in advance; on processors that others use as well (:mod:`simulator.host`) a
stage takes as long as it takes. Here is only who is where: stages take steps in order, one at a time.
"""

from collections import deque
from dataclasses import dataclass

from distserve.core.events import Event


@dataclass(slots=True, eq=False)
class Passage:
    """A step of the instance ``name``, which is over when every stage has taken its time; then ``event`` happens.

    Stage s takes ``seconds[s]`` core seconds of each of its shards, ``between`` seconds pass from one to the next, and
    ``aftermath`` core seconds of light work follow, on the tokens that the step gave.
    """

    name: str
    event: Event
    seconds: tuple[float, ...]
    between: float = 0.0
    aftermath: float = 0.0
    stage: int = 0
    num_computing: int = 0
    """Shards of the stage that are not done yet."""

    @property
    def is_in_last_stage(self) -> bool:
        """Whether nothing comes after the stage it is in."""
        return self.stage == len(self.seconds) - 1


class Pipeline:
    """The stages of one instance; ``num_shards`` ranks each."""

    def __init__(self, num_stages: int, num_shards: int) -> None:
        self.num_shards = num_shards
        self.num_ranks = num_stages * num_shards
        self._waiting: list[deque[Passage]] = [deque() for _ in range(num_stages)]
        self._last_arrival = [0.0] * num_stages

    def send_on(self, now: float, passage: Passage) -> float:
        """A step leaves for its next stage: when it arrives there, not before those that left before it."""
        passage.stage += 1
        arrival = max(now + passage.between, self._last_arrival[passage.stage])
        self._last_arrival[passage.stage] = arrival
        return arrival

    def enter(self, passage: Passage) -> bool:
        """A step arrives at its stage; whether the stage takes it on at once."""
        waiting = self._waiting[passage.stage]
        waiting.append(passage)
        return len(waiting) == 1

    def leave(self, passage: Passage) -> Passage | None:
        """A stage is done with a step: the one it takes on next, if any waits."""
        waiting = self._waiting[passage.stage]
        left = waiting.popleft()
        assert left is passage
        return waiting[0] if waiting else None
