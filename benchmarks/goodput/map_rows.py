"""The map's table: a row for each mode in each cell, and who wins a cell."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.goodput.fleet import MODES

_MODES = {mode.name: mode for mode in MODES}


@dataclass(frozen=True, slots=True)
class Row:
    """One mode in one cell. Rates are requests/s and GPU: ``low`` was held and ``high`` was not.

    ``bandwidth`` (bytes/s) 0: any, for the mode moves no KV. ``goodput`` 0: it is less than ``high``, which is a share
    of another mode's; or, where ``high`` is 0 too, the objective cannot be met. ``ttft`` and ``tpot`` are the limits in
    seconds, ``setting`` the instances and what was tuned of them, ``binding`` what keeps the goodput from being larger.
    """

    model: str
    objective: str
    prompt: int
    output: int
    bandwidth: float
    mode: str
    goodput: float
    low: float
    high: float
    setting: str
    binding: str
    ttft: float
    tpot: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Where it is on the map, links aside."""
        return self.model, self.objective, self.prompt, self.output


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who wins a cell: ``winner`` is a mode's letter, empty if no mode meets the objective.

    ``ratio`` is the best goodput with a pool of prefill instances over the best one of mixed instances alone. With
    ``is_bound`` it is further from 1 than that: the loser was not measured closely.
    """

    winner: str
    ratio: float
    is_bound: bool


def judge(rows: Sequence[Row]) -> Verdict:
    """The verdict on a cell, given every mode's row in it."""
    pooled, mixed = (
        max((row for row in rows if _MODES[row.mode].moves_kv is moves), key=lambda row: (row.goodput, row.high))
        for moves in (True, False)
    )
    best, worse = (pooled, mixed) if pooled.goodput > mixed.goodput else (mixed, pooled)
    if best.goodput == 0:
        return Verdict("", 1.0, is_bound=False)
    known = worse.goodput or worse.high
    times = best.goodput / known if known else float("inf")
    return Verdict(_MODES[best.mode].letter, times if best is pooled else 1 / times, worse.goodput == 0)


def in_cell(rows: Iterable[Row], key: tuple[str, str, int, int], bandwidth: float) -> list[Row]:
    """The rows of every mode in one cell."""
    return [row for row in rows if row.key == key and row.bandwidth in {0.0, bandwidth}]
