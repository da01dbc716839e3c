"""What surrounds a plan: the same placement under other loads, its neighbours, what it is without one instance.

Facts only; :mod:`placement.sensitivity` finds them and :mod:`placement.report` shows them.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from placement.plan import Evaluation, Plan, RatePoint


class Change(StrEnum):
    """What a variant changes."""

    LOAD = "load"
    LENGTHS = "lengths"
    LOSS = "loss"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Variant:
    """The chosen placement changed in one thing.

    ``point`` is what it does with the (changed) load at ``point.rate``; None where it cannot be built, and ``reason``
    says why. ``goodput`` is requests/s, measured no closer than ``goodput_tolerance`` (a share).
    """

    change: Change
    label: str
    num_gpus: int
    point: RatePoint | None
    goodput: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Phases:
    """Where the time of requests goes at one rate: means in seconds over answered requests, and the misses.

    ``queue`` from arrival to the prompt's first step, ``prefill`` from there to the first token, ``transfer`` for the
    KV pull beyond the first token, ``wait`` from there to the first decode step, ``decode`` the rest.
    ``missed_ttft`` and ``missed_tpot`` are shares of the requests offered.
    """

    rate: float
    queue: float
    prefill: float
    transfer: float
    wait: float
    decode: float
    missed_ttft: float
    missed_tpot: float


@dataclass(frozen=True, slots=True)
class KvFlow:
    """``rate`` bytes/s of KV from one instance to another, by their positions in ``Placement.instances``."""

    source: int
    target: int
    rate: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Latencies of the measured requests of one placement at one rate: seconds, NaN where a request got none.

    Both arrays have one entry per request offered in the measured window.
    """

    label: str
    rate: float
    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one candidate over a range of rates, ascending, each from as many runs of the same requests."""

    name: str
    evaluation: Evaluation
    points: tuple[RatePoint, ...]


@dataclass(frozen=True)
class Outlook:
    """Everything beside the search's own answer.

    ``above`` is the chosen placement above its goodput, ``breaks`` what fails there first, in words, and ``phases``
    where requests' time goes at the planned rate and there. ``curves`` are of the leading candidates, if asked for.
    """

    variants: tuple[Variant, ...]
    above: tuple[RatePoint, ...]
    breaks: str
    goodput_tolerance: float
    phases: tuple[Phases, ...]
    samples: tuple[Sample, ...]
    flows: tuple[KvFlow, ...]
    curves: tuple[Curve, ...] = ()

    def of(self, change: Change) -> tuple[Variant, ...]:
        """The variants of one kind."""
        return tuple(variant for variant in self.variants if variant.change is change)


def rivals(plan: Plan) -> list[tuple[str, Evaluation]]:
    """The chosen placement and its rivals, each once, with the name of its part in the plan."""
    named = [
        ("chosen", plan.chosen),
        ("runner-up", plan.runner_up),
        ("best disaggregated", plan.disaggregated),
        ("best colocated", plan.colocated),
        ("best hybrid", plan.hybrid),
        ("as given", plan.paper),
        *(("finalist", found) for found in plan.finalists),
    ]
    found: list[tuple[str, Evaluation]] = []
    for name, evaluation in named:
        if evaluation is not None and all(evaluation.placement != other.placement for _, other in found):
            found.append((name, evaluation))
    return found
