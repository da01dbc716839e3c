"""DistServe's claims in simulation: its figures 8 and 9, and what each assumption of its comparison is worth.

    python -m benchmarks.goodput.distserve_claims --fits DIR        # about 10 minutes of one core

``DIR`` holds DistServe's ``profiler-a100-80g.distserve.json`` and ``.vllm.json`` (LLMServe/DistServe,
simdistserve/estimators/profile_data); without it the analytic model stands in, which is fitted to them.

First the experiment as it was published: its placement beside one instance of the vLLM of 2023, as fast as its authors
measured that to be, with their limits, rates and numbers of requests. Then the same with one assumption changed at a
time. Attainment is the mean over several draws of the workload, and a rate (or a factor on both limits, the SLO scale)
is held up to where 90% is crossed, as in the paper. Rates are sought beyond the published sweep where it does not
cross. Placements are the paper's and those that benchmarks/paper_cases found.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.machine import describe_run
from benchmarks.goodput.distserve_published import Published
from benchmarks.goodput.distserve_report import draw, report
from benchmarks.goodput.distserve_systems import Case, System
from benchmarks.paper_cases.run import CASES
from distserve.core.config import SLO
from placement.steady import measure_window
from simulator.results import Timelines

TARGET = 0.9
_BEYOND = 1.25
_FURTHEST = 16.0
"""A sweep is continued to so many times its highest rate, and down to as small a part of its lowest."""
_NARROW = 1.04
_SHORT_SHARES = (0.25, 0.5)
"""LongBench's questions are answered in a few words, its other tasks in many; the example's answers are all alike."""


@dataclass(frozen=True)
class Effort:
    """How a rate is looked at: ``draws`` of ``requests`` requests; ``steady``: without ramp and drain.

    In a steady state a draw whose backlog grows has met nothing.
    """

    draws: int
    requests: int
    steady: bool = False


@dataclass(frozen=True)
class Figures:
    """Of one system: attainment over the published rates and SLO scales, and where 90% is crossed.

    ``rate`` in requests/s and GPU, None if no rate holds; ``scale`` is the factor on both limits at the published rate,
    None if none is enough. ``ttft`` and ``tpot`` are the scales that each limit alone would need. ``scripted_rate`` is
    the rate that the published sweep shows, which has a lowest and a highest. ``lone`` is the share
    of the TTFT that a long prompt (90th percentile) takes by itself.
    """

    system: str
    gpus: int
    rates: tuple[float, ...]
    attained: tuple[float, ...]
    scales: tuple[float, ...]
    attained_at_scale: tuple[float, ...]
    rate: float | None
    scale: float | None
    ttft: float | None
    tpot: float | None
    scripted_rate: float
    lone: float


def needed(timelines: Timelines, slo: SLO, *, steady: bool) -> NDArray[np.float64]:
    """The factors on TTFT and TPOT with which each request would have met them, [2, requests]; infinite: none."""
    if steady:
        window = measure_window(timelines, slo)
        ttft, tpot = window.ttft, window.tpot
        if window.instability:
            ttft = np.full_like(ttft, np.inf)
    else:
        ok = timelines.status == 200
        ttft, tpot = np.where(ok, timelines.ttft, np.inf), np.where(ok, timelines.tpot, np.inf)
    return np.nan_to_num(np.stack([ttft / slo.ttft, tpot / slo.tpot]), nan=np.inf, posinf=np.inf)


def study(system: System, published: Published, slo: SLO, effort: Effort) -> Figures:
    """The rate and the SLO-scale sweep of one system."""

    def factors(per_gpu: float) -> NDArray[np.float64]:
        runs = [system.run(per_gpu, draw, effort.requests) for draw in range(effort.draws)]
        return np.concatenate([needed(run, slo, steady=effort.steady) for run in runs], axis=1)

    attained: dict[float, float] = {}

    def probe(per_gpu: float) -> float:
        if per_gpu not in attained:
            attained[per_gpu] = float((factors(per_gpu).max(axis=0) <= 1).mean())
        return attained[per_gpu]

    swept = tuple(probe(rate) for rate in published.rates)
    low = published.rates[0]
    while probe(low) < TARGET and low > published.rates[0] / _FURTHEST:
        low /= 2
    high = published.rates[-1]
    while probe(high) >= TARGET and high < published.rates[-1] * _FURTHEST:
        high *= _BEYOND
    while (around := bracket(attained)) is not None and around[1] > _NARROW * around[0]:
        probe(sum(around) / 2)
    at = factors(published.scale_rate)
    both, ttft, tpot = (_quantile(values) for values in (at.max(axis=0), at[0], at[1]))
    scales = tuple(np.geomspace(0.25, 16, 37).tolist())
    return Figures(
        system=system.name,
        gpus=system.num_gpus,
        rates=published.rates,
        attained=swept,
        scales=scales,
        attained_at_scale=tuple(float((at.max(axis=0) <= scale).mean()) for scale in scales),
        rate=crossing(attained),
        scale=both,
        ttft=ttft,
        tpot=tpot,
        scripted_rate=scripted(published.rates, swept),
        lone=system.lone_prompt() / slo.ttft,
    )


def crossing(attained: dict[float, float]) -> float | None:
    """The rate at which attainment first falls below the target, linear between rates; None: it is never there."""
    around = bracket(attained)
    if around is None:
        return max(attained) if attained[min(attained)] >= TARGET else None
    low, high = around
    return low + (high - low) * (attained[low] - TARGET) / (attained[low] - attained[high])


def scripted(rates: Sequence[float], attained: Sequence[float]) -> float:
    """Where 90% is crossed within the published rates; where it is not, the highest or, like its script, the lowest."""
    for (low, a), (high, b) in pairwise(zip(rates, attained, strict=True)):
        if (a < TARGET) != (b < TARGET):
            return low + (high - low) * (a - TARGET) / (a - b)
    return rates[-1] if attained[0] >= TARGET else rates[0]


def bracket(attained: dict[float, float]) -> tuple[float, float] | None:
    """The first two neighbouring rates of which the lower one holds and the higher one does not."""
    ordered = sorted(attained.items())
    return next(((low, high) for (low, a), (high, b) in pairwise(ordered) if a >= TARGET > b), None)


def _quantile(factors: NDArray[np.float64]) -> float | None:
    found = float(np.quantile(factors, TARGET, method="higher"))
    return found if np.isfinite(found) else None


CHOSEN = {"paper's placement", "vLLM of 2023"}
"""Systems that are also looked at in a steady state, by the limits of the first version, and with short answers."""
LONGBENCH = "opt-66b-longbench"
RUNS = ("short", "steady", "first", *(f"short answers {share:.0%}" for share in _SHORT_SHARES))


def run_case(name: str, fits: Path | None, short: Effort, steady: Effort) -> dict[str, Any]:
    """All figures of one workload."""
    case = Case(name, fits)
    slo = case.problem.slo
    found: dict[str, Any] = {"case": name, "slo": asdict(slo), "latency": case.problem.latency.source}
    found |= {"slow": case.slow.latency.source, **{runs: {} for runs in RUNS}}
    for system in case.systems():
        began = time.perf_counter()
        effort = replace(short, requests=case.published.requests * system.num_gpus)
        found["short"][system.name] = asdict(study(system, case.published, slo, effort))
        if system.name in CHOSEN and case.published.first_slo is not None:
            found["first"][system.name] = asdict(study(system, case.published, case.published.first_slo, effort))
        if system.name in CHOSEN and name == LONGBENCH:
            for share in _SHORT_SHARES:
                mixed = study(system.with_short_answers(share), case.published, slo, effort)
                found[f"short answers {share:.0%}"][system.name] = asdict(mixed)
        if system.name in CHOSEN:
            found["steady"][system.name] = asdict(study(system, case.published, slo, steady))
        rate, scale = (found["short"][system.name][key] for key in ("rate", "scale"))
        say(f"{name}: {system.name}, rate {rate}, scale {scale}, {time.perf_counter() - began:.0f} s")
    return found


def write_csv(results: Sequence[dict[str, Any]], file: Path) -> None:
    """The sweeps, one line for each point."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["case", "runs", "system", "gpus", "swept", "value", "attainment"])
        for result in results:
            for runs in RUNS:
                for name, figures in result[runs].items():
                    for swept, shares in (("rates", "attained"), ("scales", "attained_at_scale")):
                        for value, share in zip(figures[swept], figures[shares], strict=True):
                            row = [result["case"], runs, name, figures["gpus"], swept, f"{value:.5g}", f"{share:.4f}"]
                            writer.writerow(row)


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    """Run the workloads, write the sweeps, the tables and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=Path, help="directory of DistServe's profiler-a100-80g.*.json")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--draws", type=int, default=5, help="workloads drawn at each rate")
    parser.add_argument("--quick", action="store_true", help="to rehearse: one draw, short steady runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory")
    options = parser.parse_args()
    facts = describe_run("benchmarks.goodput.distserve_claims")
    facts["command"] = "python -m benchmarks.goodput.distserve_claims" + " --fits DIR" * (options.fits is not None)
    options.output.mkdir(parents=True, exist_ok=True)
    short = Effort(1 if options.quick else options.draws, 0)
    steady = Effort(1, 200, steady=True) if options.quick else Effort(2, 800, steady=True)
    results: list[dict[str, Any]] = []
    for name in sorted(options.cases, key=CASES.index):
        results.append(run_case(name, options.fits, short, steady))
        write(results, facts, short.draws, options.output)
    print((options.output / "distserve.md").read_text(encoding="utf-8"))


def write(results: Sequence[dict[str, Any]], facts: dict[str, Any], num_draws: int, directory: Path) -> None:
    """The sweeps, the figures, the tables and the plots."""
    write_csv(results, directory / "distserve.csv")
    kept = [strip(result) for result in results]
    document = json.dumps({"facts": facts, "cases": kept}, indent=1) + "\n"
    (directory / "distserve.json").write_text(document, encoding="utf-8")
    draw(results, directory)
    (directory / "distserve.md").write_text(report(results, facts, num_draws), encoding="utf-8")


def strip(result: dict[str, Any]) -> dict[str, Any]:
    """Without the sweeps, which are in the CSV file."""
    keys = ("gpus", "rate", "scripted_rate", "scale", "ttft", "tpot", "lone")
    tables = {
        runs: {name: {key: figures[key] for key in keys} for name, figures in result[runs].items()} for runs in RUNS
    }
    return result | tables


if __name__ == "__main__":
    main()
