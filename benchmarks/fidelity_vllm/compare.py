"""The fifteen numbers of a replay beside the measured ones, and beside another simulator's errors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.fidelity_vllm.replay import Run
from simulator.results import Floats, Simulation

STATISTICS = ("Mean", "Median", "P90", "P95", "P99")


@dataclass(frozen=True, slots=True)
class Row:
    """One number: milliseconds measured and simulated, and the error in percent of the other simulator."""

    metric: str
    statistic: str
    measured: float
    simulated: float
    their_error: float

    @property
    def error(self) -> float:
        """Percent, to the digit that the other simulator's are given to."""
        return round(100 * (self.simulated / self.measured - 1), 1)

    @property
    def holds(self) -> bool:
        """Whether it is no further off than the other simulator's."""
        return abs(self.error) <= abs(self.their_error)


@dataclass(frozen=True, slots=True)
class Wave:
    """A run up to ``until`` seconds: first and last tokens measured by then, and how far off the replay's are.

    Errors are medians of absolute differences between points in time, in seconds.
    """

    until: float
    num_first: int
    num_last: int
    first_error: float
    last_error: float


def first_wave(run: Run, simulation: Simulation) -> Wave:
    """The run before the longest time that it gave nobody a first token comes to its end.

    Where memory holds only some of the requests, those of the first wave run among themselves that long, preempting
    each other.
    """
    order = np.sort(run.first_token)
    until = float(order[np.diff(order).argmax() + 1])
    lines = simulation.timelines
    first, last = run.first_token < until, run.finish < until
    return Wave(
        until=until,
        num_first=int(first.sum()),
        num_last=int(last.sum()),
        first_error=float(np.median(np.abs(lines.first_token - run.first_token)[first])),
        last_error=float(np.median(np.abs(lines.finish - run.finish)[last])),
    )


def compare(run: Run, simulation: Simulation) -> list[Row]:
    """All rows of a run. Both sides count from a request's arrival."""
    lines = simulation.timelines
    assert (lines.status == 200).all(), "vLLM answered everything"
    sides = {
        "TTFT": (run.ttft, lines.ttft),
        "TPOT": (run.tpot, lines.tpot),
        "Latency": (run.latency, lines.latency),
    }
    theirs = read_summary(run.directory / "validation" / "summary.txt")
    return [
        Row(metric, name, measured, simulated, theirs[metric, name])
        for metric, (real, ours) in sides.items()
        for name, measured, simulated in zip(STATISTICS, _statistics(real), _statistics(ours), strict=True)
    ]


def read_summary(path: Path) -> dict[tuple[str, str], float]:
    """(metric, statistic) -> signed error in percent; rows are ``TTFT Mean  measured  simulated  +0.6%``."""
    words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row[0], row[1]): float(row[4].rstrip("%")) for row in words if len(row) == 5 and row[4].endswith("%")}


def _statistics(seconds: Floats) -> list[float]:
    return [1e3 * float(value) for value in (seconds.mean(), *np.percentile(seconds, (50, 90, 95, 99)))]
