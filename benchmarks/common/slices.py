"""A long measurement is made in slices of time in which the machine is quiet; what ends one is here."""

import time
from collections.abc import Callable
from typing import TypeVar

from benchmarks.common.machine import OtherLoad
from benchmarks.common.servers import Server

T = TypeVar("T")
_ATTEMPTS = 3


class SliceOverError(Exception):
    """The time is up, or the machine is not quiet: what is measured so far is kept, and can be gone on with."""


class Slice:
    """``minutes`` from now on, as long as others keep no more than ``max_other_load`` cores busy."""

    def __init__(self, minutes: float, max_other_load: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._max_other_load = max_other_load

    def check(self) -> None:
        """Before anything that takes long; raises SliceOverError when the time is up."""
        if time.monotonic() > self._end:
            raise SliceOverError("the time is up")

    def measure(self, work: Callable[[], T], *servers: Server) -> tuple[T, float]:
        """What ``work`` gives, and the cores that others than ``servers`` kept busy meanwhile.

        Where those were too many, it is done again, a few times. Raises SliceOverError if the machine stays busy, or
        the time is up.
        """
        for _ in range(_ATTEMPTS):
            self.check()
            with OtherLoad(*servers) as other:
                result = work()
            if other.cores <= self._max_other_load:
                return result, other.cores
        raise SliceOverError(f"other processes kept {other.cores:.2f} cores busy: what was measured then is not kept")
