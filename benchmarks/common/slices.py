"""A long measurement is made in slices of time in which the machine is quiet; what ends one is here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common.machine import OtherLoad
from benchmarks.common.servers import Server


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

    @contextmanager
    def quiet(self, *servers: Server) -> Iterator[OtherLoad]:
        """A context in which ``servers`` are measured; raises SliceOverError at its end if others disturbed that."""
        self.check()
        with OtherLoad(*servers) as other:
            yield other
        if other.cores > self._max_other_load:
            raise SliceOverError(
                f"other processes kept {other.cores:.2f} cores busy: what was measured then is not kept"
            )
