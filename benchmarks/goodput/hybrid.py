"""Hybrid deployments in simulation: prefill beside mixed instances, against the same GPUs all mixed or all apart.

    python -m benchmarks.goodput.hybrid                      # from the repository's root; half an hour of one core
    python -m benchmarks.goodput.hybrid --instances 4 --workload chat --objective balanced      # several minutes a cell
    python -m benchmarks.goodput.hybrid --report             # table and plot of what is there

An instance on each GPU, all on one node. For each cell (number of instances, load, objective) and each composition of
the instances the goodput is found: the largest rate (requests/s) at which 90% of the requests meet TTFT and TPOT. The
compositions are all splits into prefill and decode instances, mixed instances alone, and all splits into prefill and
mixed ones, for several token budgets of the mixed instances' steps. Every composition is offered the same requests, is
fixed before a run and does not change in it. The first seed chooses the best composition of each kind; those are
measured again with other seeds. What was measured is kept; `make fast` before takes a third of the time.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.hybrid_loads import NAMES, Load, find_load
from benchmarks.goodput.hybrid_report import Cell, Row, chosen, draw, report
from distserve.bench.workload import Workload
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import StepTime
from distserve.core.router import RouterConfig
from distserve.core.topology import Gpu
from placement.goodput import find_goodput
from placement.measure import Effort, one_by_one
from simulator.latency.analytic import AnalyticModel
from simulator.latency.gpus import find_gpu
from simulator.latency.memory import kv_config
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Simulation
from simulator.simulation import simulate

RESULTS = Path(__file__).parent / "results" / "hybrid"
BUDGETS = {"mixed": (256, 512, 1024, 2048), "hybrid": (512, 1024, 2048)}
"""Tokens of a mixed instance's step, beside prefill instances and without."""
PREFILL_TOKENS = 2048
MAX_BATCH_SIZE = 512
TOLERANCE = 0.02
"""How far apart the rate that held and the one that failed may stay, as a share of the latter."""
SECONDS, PATIENCES, LEAST = 20.0, 16, 1500
"""A run is at least so many seconds of arrivals, so many times the TTFT, and so many requests."""
FIRST = 0.3
"""Of what no instance can serve: where a cell's goodput is looked for first."""


@dataclass(frozen=True, slots=True)
class Composition:
    """How many instances of each role, and the token budget of the mixed ones (0: there are none)."""

    prefill: int
    decode: int
    mixed: int
    budget: int = 0

    @property
    def num_instances(self) -> int:
        """Of all roles."""
        return self.prefill + self.decode + self.mixed

    @property
    def kind(self) -> str:
        """``disaggregated``, ``mixed`` or ``hybrid``."""
        if not self.mixed:
            return "disaggregated"
        return "hybrid" if self.prefill else "mixed"

    def __str__(self) -> str:
        counts = ((self.prefill, "P"), (self.decode, "D"), (self.mixed, "M"))
        name = " + ".join(f"{count}{letter}" for count, letter in counts if count)
        return f"{name}, {self.budget} tokens" if self.budget else name


def compositions(count: int) -> Iterator[Composition]:
    """All that ``count`` instances can be."""
    for prefill in range(1, count):
        yield Composition(prefill, count - prefill, 0)
    for budget in BUDGETS["mixed"]:
        yield Composition(0, 0, count, budget)
    for prefill in range(1, count):
        for budget in BUDGETS["hybrid"]:
            yield Composition(prefill, 0, count - prefill, budget)


def model_of(load: Load, composition: Composition, slo: SLO) -> ClusterModel:
    """The deployment; nothing is shed."""
    roles = [Role.PREFILL] * composition.prefill + [Role.DECODE] * composition.decode
    roles += [Role.MIXED] * composition.mixed
    tokens = {Role.PREFILL: PREFILL_TOKENS, Role.DECODE: MAX_BATCH_SIZE, Role.MIXED: composition.budget}
    instances = []
    for index, role in enumerate(roles):
        size = min(MAX_BATCH_SIZE, tokens[role])
        scheduler = SchedulerConfig(max_batch_tokens=tokens[role], max_batch_size=size, max_model_len=8192)
        spec = InstanceSpec(f"{role}-{index}", role, memory(load, tokens[role]), scheduler)
        instances.append(InstanceModel(spec, step_time(load), (Gpu(0, index),)))
    router = RouterConfig(max_wait=float("inf"), slo=slo)
    return ClusterModel(tuple(instances), load.cluster, load.model.kv, router=router)


@cache
def step_time(load: Load) -> StepTime:
    """Of every instance."""
    return AnalyticModel(load.model, load.cluster).step_time(ParallelConfig())


@cache
def memory(load: Load, max_batch_tokens: int) -> KvConfig:
    """What weights and workspace leave of a card."""
    kv = kv_config(load.model, find_gpu(load.cluster.gpu), ParallelConfig(), max_batch_tokens=max_batch_tokens)
    assert kv is not None
    return kv


def offered(load: Load, rate: float, seed: int, num_requests: int) -> Workload:
    """The same requests for every composition, at every rate."""
    return replace(load.requests, num_requests=num_requests, seed=seed).at(rate)


def local_share(simulation: Simulation) -> float:
    """Share of the prompts that were prefilled where they were decoded."""
    roles = np.array([usage.role is Role.MIXED for usage in simulation.instances])
    prefilled = simulation.timelines.prefill_id
    known = prefilled >= 0
    return float(roles[prefilled[known]].mean()) if known.any() else 0.0


def goodput(
    load: Load, slo: SLO, composition: Composition, seed: int, *, floor: float, start: float
) -> tuple[float, float, int]:
    """(goodput, share prefilled locally, requests simulated); a goodput below ``floor`` is of no interest: 0."""
    model = model_of(load, composition, slo)

    def run(rate: float, number: int, num_requests: int) -> Simulation:
        requests = offered(load, rate, seed + number, num_requests)
        assert requests.arrivals is not None
        longest = slo.ttft + slo.tpot * int(requests.output_lens.max())
        # Whatever is under way then has missed the objective.
        return simulate(model, requests, until=float(requests.arrivals[-1]) + longest)

    def effort(rate: float) -> Effort:
        num = max(int(rate * max(SECONDS, PATIENCES * slo.ttft)), LEAST)
        return Effort(num, num)

    ceiling = load.most * composition.num_instances
    found = find_goodput(one_by_one(run), slo, 1.0, ceiling, effort, tolerance=TOLERANCE, start=start, floor=floor)
    if found.low <= 0:
        return 0.0, 0.0, found.num_simulated
    return found.interval.estimate, local_share(found.nearest(found.low).last), found.num_simulated


def measure_cell(cell: Cell, seed: int, known: Sequence[Row]) -> list[Row]:
    """One cell with one seed: of each kind the best composition has a goodput for certain.

    With the first seed they are found among all; with others they are what it found, which is ``known``.
    """
    count, name, objective = cell
    load = find_load(name)
    slo = load.objectives[objective]
    wanted = chosen(known, cell)
    likely = {row.composition: row.goodput for row in known if row.cell == cell}
    rows: list[Row] = []
    best: dict[str, float] = {}
    for composition in compositions(count):
        kind, label = composition.kind, str(composition)
        if seed != 0 and wanted[kind] != label:
            continue
        began = time.perf_counter()
        start = likely.get(label) or max(best.values(), default=0.0) or FIRST * load.most * count
        rate, local, simulated = goodput(load, slo, composition, seed, floor=best.get(kind, 0.0), start=start)
        best[kind] = max(best.get(kind, 0.0), rate)
        rows.append(Row(count, name, objective, seed, kind, label, round(rate, 3), round(local, 4), simulated))
        seconds = time.perf_counter() - began
        print(
            f"{count} {name}, {objective}, seed {seed}: {label}: {rate:.3g}/s, {local:.0%} local, {seconds:.0f} s",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure the cells asked for that are not there yet; then table and plot of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[2])
    parser.add_argument("--workload", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--objective", nargs="+", help="only objectives of these names")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.csv"
    rows = read_rows(file, Row)
    done = {(row.cell, row.seed) for row in rows}
    cells: list[Cell] = [
        (count, name, objective)
        for count in options.instances
        for name in options.workload
        for objective in find_load(name).objectives
        if options.objective is None or objective in options.objective
    ]
    for seed in range(options.seeds if not options.report else 0):
        for cell in cells:
            if (cell, seed) not in done:
                rows += measure_cell(cell, seed, rows)
                write_rows(file, Row, rows)
    (options.output / "report.md").write_text(report(rows, TOLERANCE), encoding="utf-8")
    draw(rows, options.output / "goodput.png")


if __name__ == "__main__":
    main()
