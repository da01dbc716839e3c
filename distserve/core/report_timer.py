"""When an instance reports its load to the router."""

from distserve.core.config import SchedulerConfig

State = tuple[int, int, int, int]
"""What a change of is worth a report: sequences and prompt tokens waiting, sequences running, attempts received."""

_UNKNOWN: State = (-1, -1, -1, -1)


class ReportTimer:
    """A report is due ``report_interval`` seconds after the last one if the state has changed, else ``heartbeat``.

    One timer pends at a time: the earlier of what a change and what silence asks for.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._reported = self._last = _UNKNOWN
        self._reported_at = -1.0
        self._pends_for = 0.0

    def is_settled(self, now: float, state: State) -> bool:
        """Whether the timer that pends was set for just this ``state``: there is nothing to do."""
        return state == self._last and now < self._pends_for

    def is_due(self, now: float, state: State) -> bool:
        """Whether to report ``state`` now, and call :meth:`reported`. In any case :meth:`next_wake` is to follow."""
        self._last = state
        # Compared as sums, the way timers are set: a difference may round the other way and the timer fire for ever.
        return self._reported_at < 0 or now >= self._reported_at + self._interval

    def reported(self, now: float, state: State) -> None:
        """A report has left, after which the state is ``state``."""
        self._reported = self._last = state
        self._reported_at = now

    def next_wake(self, now: float) -> float | None:
        """When to look again (seconds); None if the timer that pends is soon enough."""
        wake = self._reported_at + self._interval
        if self._pends_for <= now or wake < self._pends_for:
            self._pends_for = wake
            return wake
        return None

    @property
    def _interval(self) -> float:
        return self._config.heartbeat if self._last == self._reported else self._config.report_interval
