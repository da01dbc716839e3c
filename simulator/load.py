"""How a run's load went over time: batches as they were computed, requests and KV memory from the timelines."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distserve.core.latency import StepShape
from simulator.model import InstanceModel
from simulator.results import Floats, Simulation, Timelines

_NUM_BINS = 512


class BatchRecorder:
    """Implements :class:`simulator.recorder.Recorder`: per instance, batch size over time.

    Time is cut into equal bins; when the run outgrows them, neighbours are joined, so memory stays what it is.
    """

    def __init__(self) -> None:
        self.width = 0.01
        """Seconds of a bin."""
        self._weighted: dict[str, list[float]] = {}

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:
        """See :class:`simulator.recorder.Recorder`; an instance's first stage stands for all."""
        if stage:
            return
        while end >= self.width * _NUM_BINS:
            self.width *= 2
            for name, values in self._weighted.items():
                joined = [values[i] + values[i + 1] for i in range(0, _NUM_BINS, 2)]
                self._weighted[name] = joined + [0.0] * (_NUM_BINS // 2)
        weighted = self._weighted.setdefault(instance_id, [0.0] * _NUM_BINS)
        size = shape.num_prefills + shape.num_decodes
        at, width = int(start / self.width), self.width
        while start < end:
            until = min(end, (at + 1) * width)
            weighted[at] += size * (until - start)
            start = until
            at += 1

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        """See :class:`simulator.recorder.Recorder`; not of interest here."""

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        """See :class:`simulator.recorder.Recorder`; not of interest here."""

    @property
    def times(self) -> Floats:
        """The middle of each bin, seconds."""
        return np.arange(0.5, _NUM_BINS) * np.float64(self.width)

    def batch(self, instance_id: str) -> Floats:
        """The mean number of sequences in the step under way, per bin; an instance without one counts as 0."""
        return np.array(self._weighted.get(instance_id, [0.0] * _NUM_BINS)) / np.float64(self.width)


@dataclass(frozen=True)
class Stages:
    """Requests over ``times``: waiting for a prefill instance, being prefilled, between the two, being decoded."""

    times: Floats
    waiting: NDArray[np.int64]
    prefill: NDArray[np.int64]
    moving: NDArray[np.int64]
    decode: NDArray[np.int64]


def stages(timelines: Timelines, end: float, num: int = _NUM_BINS) -> Stages:
    """How many requests were in which stage at ``num`` times until ``end``; shed and failed ones are in none.

    On a mixed instance a request is decoded from its first token on. A resubmitted one counts by its last attempt.
    """
    times = np.linspace(0.0, end, num)
    kept = (timelines.status == 200) | (timelines.status == 0)
    arrival = timelines.arrival[kept]
    prefill = _or_end(timelines.prefill_start[kept], end)
    first = np.maximum(_or_end(timelines.first_token[kept], end), prefill)
    finish = np.maximum(_or_end(timelines.finish[kept], end), first)
    decode = np.minimum(np.fmax(timelines.decode_start[kept], first), finish)
    marks = (arrival, np.maximum(prefill, arrival), first, decode, finish)
    passed = [np.searchsorted(np.sort(mark), times, side="right") for mark in marks]
    counts = [before - after for before, after in pairwise(passed)]
    return Stages(times, *counts)


def _or_end(times: Floats, end: float) -> Floats:
    return np.where(np.isnan(times), end, times)


def kv_use(simulation: Simulation, model: InstanceModel, index: int, times: Floats) -> Floats:
    """Share of instance ``index``'s KV memory that requests held at ``times``, from the timelines.

    A prompt that another instance pulls is held from the start of its prefill to the end of the pull, whatever role the
    instance had then; others from the start of prefill or pull to the last token, a token more with every step, evenly.
    Blocks are counted as if filled. Of requests that failed nobody knows when they left; they are not counted.
    """
    timelines = simulation.timelines
    end = simulation.duration
    kept = (timelines.status == 200) | (timelines.status == 0)
    mine = kept & ((timelines.prefill_id == index) | (timelines.decode_id == index))
    came_by_pull = timelines.decode_id[mine] == index
    goes_by_pull = ~came_by_pull & (timelines.decode_id[mine] >= 0)
    prompts = timelines.prompt_tokens[mine].astype(np.float64)
    outputs = np.where(goes_by_pull, 0.0, timelines.output_tokens[mine].astype(np.float64))
    first = _or_end(np.fmax(timelines.first_token[mine], timelines.decode_start[mine]), end)
    finish = np.maximum(_or_end(timelines.finish[mine], end), first)
    start = _or_end(np.where(came_by_pull, timelines.migration_start[mine], timelines.prefill_start[mine]), end)
    until = np.where(goes_by_pull, _or_end(timelines.migration_end[mine], end), finish)
    growth = np.divide(outputs, finish - first, out=np.zeros_like(outputs), where=finish > first)
    # tokens held at t = sum over live requests of (prompt - growth x first) + t x (growth), growing once decoded.
    held = _running(times, start, until, prompts)
    grown = _running(times, first, until, -growth * first) + times * _running(times, first, until, growth)
    return np.maximum(held + grown, 0.0) / model.spec.kv.num_tokens


def _running(times: Floats, start: Floats, end: Floats, value: Floats) -> Floats:
    """The sum of ``value`` over what has started and not ended, at each time."""
    total = np.zeros(len(times) + 1)
    np.add.at(total, np.searchsorted(times, start, side="left"), value)
    np.add.at(total, np.searchsorted(times, np.maximum(end, start), side="left"), -value)
    return np.cumsum(total)[:-1]
