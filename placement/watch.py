"""Keeps the load of a running deployment, holds it against the plan's, and says when the two part.

Implements :class:`distserve.cluster.observations.Observer`. What it kept can be written as a trace that the planner
reads, so that the plan can be made again from what was observed.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placement.drift import Expected, Finding, Observed, judge
from placement.trace_file import write_trace
from placement.words import seconds

_MOST_KEPT = 200_000
"""Requests kept for a trace; older ones are forgotten."""


@dataclass(slots=True)
class _Seen:
    time: float
    num_prompt_tokens: int
    num_output_tokens: int | None = None


class LoadWatch:
    """Observes requests and compares those of the last ``window`` seconds with ``expected``."""

    def __init__(self, expected: Expected, window: float) -> None:
        self.window = window
        self._expected = expected
        self._seen: deque[_Seen] = deque(maxlen=_MOST_KEPT)
        self._open: dict[str, _Seen] = {}
        self._first: float | None = None
        self._standing: tuple[Finding, ...] = ()

    def __len__(self) -> int:
        return len(self._seen)

    def arrived(self, request_id: str, time: float, num_prompt_tokens: int) -> None:
        """See :class:`distserve.cluster.observations.Observer`."""
        if self._first is None:
            self._first = time
        self._open[request_id] = seen = _Seen(time, num_prompt_tokens)
        self._seen.append(seen)

    def ended(self, request_id: str, num_output_tokens: int, *, complete: bool) -> None:
        """See :class:`distserve.cluster.observations.Observer`; requests that were under way before are unknown."""
        seen = self._open.pop(request_id, None)
        if seen is not None and complete:
            seen.num_output_tokens = num_output_tokens

    def observed(self, now: float) -> Observed:
        """The last window, which begins with the first arrival at the earliest: before it there was no service."""
        if self._first is None:
            return Observed(0.0, 0, np.empty(0, np.int64), np.empty(0, np.int64), full=False)
        begin = max(now - self.window, self._first)
        recent = [seen for seen in self._seen if seen.time > begin]
        # Of those that came before the oldest one still under way all have ended: no length is missing for being long.
        oldest = next(iter(self._open.values())).time if self._open else now
        served = [s.num_output_tokens for s in recent if s.num_output_tokens is not None and s.time < oldest]
        return Observed(
            span=now - begin,
            num_arrivals=len(recent),
            prompt_lens=np.array([seen.num_prompt_tokens for seen in recent], np.int64),
            output_lens=np.array(served, np.int64),
            full=now - begin >= self.window,
        )

    def look(self, now: float) -> tuple[Finding, ...] | None:
        """What differs from the plan, if that has changed since the last look; an empty tuple: nothing any more."""
        found = judge(self._expected, self.observed(now), self._standing)
        changed = {(f.quantity, f.is_more) for f in found} != {(f.quantity, f.is_more) for f in self._standing}
        self._standing = found
        return found if changed else None

    def write_trace(self, path: Path, now: float) -> int:
        """Write the last window's requests as a trace (Azure's columns); returns their number.

        A request that was not served to its end has an output length of one that was, so that the trace has the rate
        that was offered.
        """
        recent = [seen for seen in self._seen if seen.time > now - self.window]
        served = [seen.num_output_tokens for seen in recent if seen.num_output_tokens]
        stand_ins = served or [1]
        return write_trace(
            path,
            (
                (seen.time, seen.num_prompt_tokens, seen.num_output_tokens or stand_ins[index % len(stand_ins)])
                for index, seen in enumerate(recent)
            ),
        )


def describe(findings: tuple[Finding, ...], span: float) -> str:
    """A sentence for people: what differs over ``span`` seconds, and whether it only wastes GPUs or breaks the plan."""
    if not findings:
        return "The load is what was planned for again."
    spare = all(not finding.is_more for finding in findings)
    head = "The plan serves more than comes in" if spare else "The plan no longer holds"
    return f"{head}: over the last {seconds(span)} {'; '.join(finding.text for finding in findings)}."
