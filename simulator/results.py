"""What a simulated run yields: every request's timeline as columns, and what instances and links did."""

import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import SLO, Role
from simulator.client import Record

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_TIMES = ("prefill_start", "prefill_end", "first_token", "migration_start", "migration_end", "decode_start", "finish")
_COUNTS = {"status": 0, "num_attempts": 0, "prefill_id": -1, "decode_id": -1}


@dataclass(frozen=True)
class Timelines:
    """One entry per request offered, in order of arrival. Times in seconds of the run; NaN: it did not happen.

    ``status`` is 200 for a request answered in full, an HTTP error code for one that was not, 0 for one still under
    way when the run ended. ``first_token`` and ``finish`` are when the owner has the token. ``migration_*`` bracket the
    KV pull; they and ``prefill_*`` are of the last attempt. ``prefill_id`` and ``decode_id`` index
    ``Simulation.instances`` (-1: none).
    """

    arrival: Floats
    prompt_tokens: Counts
    output_tokens: Counts
    prefill_start: Floats
    prefill_end: Floats
    first_token: Floats
    migration_start: Floats
    migration_end: Floats
    decode_start: Floats
    finish: Floats
    status: Counts
    num_attempts: Counts
    prefill_id: Counts
    decode_id: Counts

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def ttft(self) -> Floats:
        """Seconds from arrival to first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> Floats:
        """(last - first token) / (n - 1) seconds; 0 for one-token outputs, which meet any TPOT."""
        gaps = np.maximum(self.output_tokens - 1, 1)
        return np.where(self.output_tokens > 1, (self.finish - self.first_token) / gaps, 0.0)

    @property
    def latency(self) -> Floats:
        """Seconds from arrival to last token."""
        return self.finish - self.arrival

    def meets(self, slo: SLO) -> NDArray[np.bool_]:
        """Whether each request was answered in full within both bounds."""
        with np.errstate(invalid="ignore"):
            met: NDArray[np.bool_] = (self.status == 200) & (self.ttft <= slo.ttft) & (self.tpot <= slo.tpot)
        return met


class TimelineTable:
    """Columns being filled, a row per request; instances are known by their place in ``instance_ids``."""

    def __init__(self, num_requests: int, instance_ids: list[str]) -> None:
        self._times = {name: array("d", [math.nan]) * num_requests for name in _TIMES}
        self._counts = {name: array("q", [default]) * num_requests for name, default in _COUNTS.items()}
        self._indices = {instance_id: index for index, instance_id in enumerate(instance_ids)}

    def put(self, row: int, record: Record) -> None:
        """Take over what a request has come to."""
        times, counts = self._times, self._counts
        for name, time in record.marks.items():
            times[name][row] = time
        if record.first_token is not None:
            times["first_token"][row] = record.first_token
        if record.finish is not None and record.status == 200:
            times["finish"][row] = record.finish
        counts["status"][row] = record.status
        counts["num_attempts"][row] = record.attempt + 1
        counts["prefill_id"][row] = self._indices.get(record.prefill_id, -1)
        counts["decode_id"][row] = self._indices.get(record.decode_id, -1)

    def finish(self, arrivals: list[float], prompts: list[int], outputs: list[int]) -> Timelines:
        """The columns as arrays."""
        return Timelines(
            arrival=np.array(arrivals, np.float64),
            prompt_tokens=np.array(prompts, np.int64),
            output_tokens=np.array(outputs, np.int64),
            **{name: np.array(column) for name, column in (self._times | self._counts).items()},
        )


@dataclass(frozen=True)
class InstanceUsage:
    """What one instance did.

    ``busy`` is seconds its busiest pipeline stage worked, ``num_steps`` and ``num_tokens`` (computed) are totals,
    ``peak_kv_blocks`` the most blocks in use, ``mean_batch`` the sequences per step. Of ``num_queried_tokens`` tokens
    looked up in the prefix cache ``num_hit_tokens`` were there: not computed, or on a decode instance not pulled.
    """

    instance_id: str
    role: Role
    busy: float
    num_steps: int
    num_tokens: int
    num_sequences: int
    num_preempted: int
    peak_kv_blocks: int
    num_kv_blocks: int
    num_hit_tokens: int = 0
    num_queried_tokens: int = 0

    @property
    def mean_batch(self) -> float:
        """Sequences per step."""
        return self.num_sequences / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True)
class LinkUsage:
    """What went over one link: ``num_bytes`` in all, ``busy`` seconds during which at least one flow was on it."""

    name: str
    capacity: float
    num_bytes: float
    busy: float


@dataclass(frozen=True)
class Simulation:
    """One run. ``duration`` is the time of its last event in seconds, ``num_events`` what the loop handled."""

    timelines: Timelines
    instances: tuple[InstanceUsage, ...]
    links: tuple[LinkUsage, ...]
    duration: float
    num_events: int
