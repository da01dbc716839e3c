"""The runs that were measured so far, as curves, and the goodputs that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common.store import Store
from benchmarks.goodput.measured.contenders import CONTENDERS, Contender
from benchmarks.goodput.measured.ladder import Bracket, Ladder, bracket, goodput
from benchmarks.goodput.measured.runs import TARGET, WORKLOADS, Requests

Run = dict[str, Any]
Attainments = dict[float, list[float]]
_LADDER = Ladder(target=TARGET, width=1.5)
"""By whose ``next_repetition`` a later round is whole: that of ``--coarse``."""
_CLOSE = 0.9
"""Of the best goodput of a first round: a budget that reaches this may be the better one in others."""


@dataclass(frozen=True)
class Best:
    """What a contender reaches with a token budget in a cell: requests/s by round.

    ``ends``: the rates of the first round's bracket. ``is_open``: the highest rate measured was still within.
    """

    budget: int
    goodputs: tuple[float, ...]
    ends: Bracket

    @property
    def goodput(self) -> float:
        """The median of the rounds."""
        return median(self.goodputs)

    @property
    def is_open(self) -> bool:
        """Whether no rate was measured that is too much."""
        return self.ends[1] is None


class Results:
    """Runs and predictions in a store, by name; a run never changes once it is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[str, Run] = {name: store.read(name) for name in store.names("runs")}

    def keep(self, run: Run) -> None:
        """Keep a measured run."""
        self._store.write(run_name(run), run)
        self._runs[run_name(run)] = run

    def runs(self) -> Iterator[Run]:
        """All of them, by name."""
        for name in sorted(self._runs):
            yield self._runs[name]

    def prediction(self, run: Run) -> dict[str, Any] | None:
        """The figures predicted for ``run``, if they were."""
        name = _prediction_name(run)
        return self._store.read(name) if name in self._store else None

    def keep_prediction(self, run: Run, figures: dict[str, Any]) -> None:
        """Keep what is predicted for ``run``."""
        self._store.write(_prediction_name(run), figures)

    def curve(self, number: int, workload: str, contender: str, budget: int) -> Attainments:
        """Attainments by rate of one round."""
        wanted = {"round": number, "workload": workload, "contender": contender, "budget": budget}
        found = [run for run in self._runs.values() if wanted.items() <= run.items()]
        return {run["rate"]: attainments(run) for run in found}

    def predicted_curve(self, workload: str, contender: str, budget: int) -> Attainments:
        """The first round's, as predicted."""
        curve = {}
        for run in self._runs.values():
            if (run["round"], run["workload"], run["contender"], run["budget"]) == (1, workload, contender, budget):
                figures = self.prediction(run)
                if figures is not None:
                    curve[run["rate"]] = figures["attainments"]
        return curve

    def limit(self, workload: str, contender: Contender, objective: int, until: int) -> float | None:
        """The lowest rate that is too much for every budget before ``until``; None if there is none."""
        limits: list[float] = []
        for budget in contender.budgets[: contender.budgets.index(until)]:
            low, high = bracket(self.curve(1, workload, contender.name, budget), objective, TARGET)
            if high is not None:
                limits.append(high)
            elif low is not None:
                return None
        return max(limits, default=None)

    def best(self, workload: str, contender: Contender, objective: int) -> Best | None:
        """With the budget that is best, of those measured in most rounds; None before there is a first round."""
        found = self._by_budget(workload, contender, objective)
        # At equal goodput the first budget, which is the default.
        return max(found, key=lambda one: (len(one.goodputs), one.goodput), default=None)

    def candidates(self, workload: str, contender: Contender, objective: int) -> list[Best]:
        """Those of which the first round says that they are best, or nearly so."""
        found = self._by_budget(workload, contender, objective)
        most = max((one.goodputs[0] for one in found), default=0.0)
        # Where nothing is reached one budget is enough to see that it stays so.
        return [one for one in found if one.goodputs[0] >= _CLOSE * most] if most else found[:1]

    def _by_budget(self, workload: str, contender: Contender, objective: int) -> list[Best]:
        """What each budget that has a first round reaches, in that and in every later one that is whole."""
        found = []
        for budget in contender.budgets:
            first = self.curve(1, workload, contender.name, budget)
            if first:
                ends = bracket(first, objective, TARGET)
                later = [self.curve(n, workload, contender.name, budget) for n in range(2, 1 + self.num_rounds)]
                whole = [one for one in later if one and _LADDER.next_repetition(one, {objective: ends}) is None]
                found.append(Best(budget, tuple(goodput(one, objective, TARGET) for one in (first, *whole)), ends))
        return found

    @property
    def num_rounds(self) -> int:
        """The most that anything was repeated."""
        return max((run["round"] for run in self._runs.values()), default=0)

    def measured_workloads(self) -> list[str]:
        """Those of which there is a run, in their order."""
        names = {run["workload"] for run in self._runs.values()}
        return [name for name in WORKLOADS if name in names]

    def measured_contenders(self) -> list[Contender]:
        """Those of which there is a run, in their order."""
        names = {run["contender"] for run in self._runs.values()}
        return [contender for name, contender in CONTENDERS.items() if name in names]


def attainments(run: Run) -> list[float]:
    """By objective."""
    return Requests.from_json(run["requests"]).attainments(run["warmup"])


def run_name(run: Run) -> str:
    """Where a run is kept."""
    return f"runs/{run['workload']}/{run['contender']}-{run['budget']}/{run['round']}-{run['rate']:g}"


def _prediction_name(run: Run) -> str:
    return f"predictions{run_name(run).removeprefix('runs')}"
