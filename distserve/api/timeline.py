"""When things happened to one choice, and what follows from it (TTFT, TPOT, seconds per phase)."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from distserve.core.request import MARKS

_UNIX_OFFSET = time.time() - time.monotonic()


def wall_clock() -> float:
    """Seconds since the Unix epoch, never going back: the clock instances stamp their marks with."""
    return _UNIX_OFFSET + time.monotonic()


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


@dataclass(slots=True)
class RequestTimeline:
    """Times in seconds on the cluster clock; ``marks`` as in core.request.MARKS, the first report of each counting.

    ``arrival``, ``token_times`` and ``finish`` are taken in this process; the other marks come from the instances.
    """

    arrival: float
    marks: dict[str, float] = field(default_factory=dict)
    token_times: list[float] = field(default_factory=list)
    finish: float | None = None

    def note(self, marks: Iterable[tuple[str, float]]) -> None:
        """Keep marks that a token made known."""
        for name, at in marks:
            self.marks.setdefault(name, at)

    @property
    def first_token(self) -> float | None:
        """When the first token came in."""
        return self.token_times[0] if self.token_times else None

    @property
    def ttft(self) -> float | None:
        """Arrival to first token."""
        return _span(self.arrival, self.first_token)

    @property
    def tpot(self) -> float | None:
        """(last - first token) / (n - 1); None below two tokens."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def queue(self) -> float | None:
        """Arrival to the start of prefill."""
        return _span(self.arrival, self.marks.get("prefill_start"))

    @property
    def prefill(self) -> float | None:
        """Start to end of prefill (to the first token if the end was not reported)."""
        return _span(self.marks.get("prefill_start"), self.marks.get("prefill_end", self.first_token))

    @property
    def migration(self) -> float | None:
        """Start to end of the KV migration; None if there was none."""
        return _span(self.marks.get("migration_start"), self.marks.get("migration_end"))

    @property
    def decode(self) -> float | None:
        """Start of decoding (the first token where no decode instance reported one) to the last token."""
        times = self.token_times
        return _span(self.marks.get("decode_start", self.first_token), times[-1]) if times else None

    def as_dict(self) -> dict[str, Any]:
        """What ``return_timeline`` shows: marks, token times, and derived seconds; null where not applicable."""
        return {
            "arrival": self.arrival,
            **{name: self.marks.get(name) for name in MARKS},
            "first_token": self.first_token,
            "tokens": self.token_times,
            "finish": self.finish,
            "queue_seconds": self.queue,
            "prefill_seconds": self.prefill,
            "migration_seconds": self.migration,
            "decode_seconds": self.decode,
            "ttft_seconds": self.ttft,
            "tpot_seconds": self.tpot,
            "e2e_seconds": _span(self.arrival, self.finish),
        }
