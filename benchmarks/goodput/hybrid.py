"""Hybrid deployments in simulation: prefill beside mixed instances, against the same GPUs all mixed or all apart.

    python -m benchmarks.goodput.hybrid                      # from the repository's root; half an hour of one core
    python -m benchmarks.goodput.hybrid --instances 4 --workload chat --objective balanced      # several minutes a cell
    python -m benchmarks.goodput.hybrid --report             # table and plot of what is there

Llama-3.1-8B, an H100 for each instance, all on one node. For each cell (number of instances, lengths, objective) and
each composition of the instances the goodput is found: the largest rate (requests/s) at which 90% of the requests meet
TTFT and TPOT. The compositions are all splits into prefill and decode instances, mixed instances alone, and all splits
into prefill and mixed ones, for several token budgets of the mixed instances' steps. Every composition is offered the
same requests, is fixed before a run and does not change in it. Cells that were measured are kept; `make fast` before
takes a third of the time.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.map_grid import LLAMA_8B
from benchmarks.goodput.measured.runs import WORKLOADS
from distserve.bench.workload import Workload
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import StepTime
from distserve.core.router import RouterConfig
from distserve.core.topology import ClusterSpec, Gpu
from placement.goodput import find_goodput
from placement.measure import Effort
from simulator.latency.analytic import AnalyticModel
from simulator.latency.gpus import find_gpu
from simulator.latency.memory import kv_config
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Simulation
from simulator.simulation import simulate

RESULTS = Path(__file__).parent / "results" / "hybrid"
CLUSTER = ClusterSpec("h100-sxm", 1, 8, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9)
OBJECTIVES = {
    "tight TPOT": SLO(ttft=0.5, tpot=0.010),
    "balanced": SLO(ttft=0.2, tpot=0.020),
    "tight TTFT": SLO(ttft=0.1, tpot=0.050),
}
BUDGETS = {"mixed": (256, 512, 1024, 2048), "hybrid": (512, 1024, 2048)}
"""Tokens of a mixed instance's step, beside prefill instances and without."""
PREFILL_TOKENS = 2048
MAX_BATCH_SIZE = 512
KINDS = ("disaggregated", "mixed", "hybrid")
COLOURS = {"disaggregated": "#4c78a8", "mixed": "#54a24b", "hybrid": "#e45756"}
TOLERANCE = 0.02
"""How far apart the rate that held and the one that failed may stay, as a share of the latter."""
SECONDS = 20.0
"""Of arrivals in a run."""
CEILING = 300.0
"""Requests/s that no instance can serve."""
FIRST = 0.3
"""Of the ceiling: where a cell's goodput is looked for first."""


Cell = tuple[int, str, str]
"""Number of instances, lengths, objective."""


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


@dataclass(frozen=True, slots=True)
class Row:
    """One composition in one cell.

    ``goodput`` in requests/s; 0 if it is only known to be no better than another of its kind. ``local`` is the share of
    the prompts that were prefilled on mixed instances, at the largest rate that held.
    """

    instances: int
    workload: str
    objective: str
    kind: str
    composition: str
    goodput: float
    local: float
    num_simulated: int


def compositions(count: int) -> Iterator[Composition]:
    """All that ``count`` instances can be."""
    for prefill in range(1, count):
        yield Composition(prefill, count - prefill, 0)
    for budget in BUDGETS["mixed"]:
        yield Composition(0, 0, count, budget)
    for prefill in range(1, count):
        for budget in BUDGETS["hybrid"]:
            yield Composition(prefill, 0, count - prefill, budget)


def model_of(composition: Composition, slo: SLO) -> ClusterModel:
    """The deployment; nothing is shed."""
    roles = [Role.PREFILL] * composition.prefill + [Role.DECODE] * composition.decode
    roles += [Role.MIXED] * composition.mixed
    tokens = {Role.PREFILL: PREFILL_TOKENS, Role.DECODE: MAX_BATCH_SIZE, Role.MIXED: composition.budget}
    instances = []
    for index, role in enumerate(roles):
        size = min(MAX_BATCH_SIZE, tokens[role])
        scheduler = SchedulerConfig(max_batch_tokens=tokens[role], max_batch_size=size, max_model_len=8192)
        spec = InstanceSpec(f"{role}-{index}", role, memory(tokens[role]), scheduler)
        instances.append(InstanceModel(spec, step_time(), (Gpu(0, index),)))
    router = RouterConfig(max_wait=float("inf"), slo=slo)
    return ClusterModel(tuple(instances), CLUSTER, LLAMA_8B.model.kv, router=router)


@cache
def step_time() -> StepTime:
    """Of every instance."""
    return AnalyticModel(LLAMA_8B.model, CLUSTER).step_time(ParallelConfig())


@cache
def memory(max_batch_tokens: int) -> KvConfig:
    """What weights and workspace leave of a card."""
    kv = kv_config(LLAMA_8B.model, find_gpu(CLUSTER.gpu), ParallelConfig(), max_batch_tokens=max_batch_tokens)
    assert kv is not None
    return kv


def offered(workload: str, rate: float, seed: int, num_requests: int) -> Workload:
    """The same requests for every composition, at every rate."""
    return WORKLOADS[workload].spec(num_requests, seed).at(rate)


def local_share(simulation: Simulation) -> float:
    """Share of the prompts that were prefilled where they were decoded."""
    roles = np.array([usage.role is Role.MIXED for usage in simulation.instances])
    prefilled = simulation.timelines.prefill_id
    known = prefilled >= 0
    return float(roles[prefilled[known]].mean()) if known.any() else 0.0


def goodput(workload: str, slo: SLO, composition: Composition, floor: float, start: float) -> tuple[float, float, int]:
    """(goodput, share prefilled locally, requests simulated); a goodput below ``floor`` is of no interest: 0."""
    model = model_of(composition, slo)
    longest = slo.ttft + slo.tpot * 300

    def run(rate: float, seed: int, num_requests: int) -> Simulation:
        load = offered(workload, rate, seed, num_requests)
        assert load.arrivals is not None
        # Whatever is under way then has missed the objective.
        return simulate(model, load, until=float(load.arrivals[-1]) + longest)

    def effort(rate: float) -> Effort:
        num = int(rate * SECONDS)
        return Effort(num, num)

    ceiling = CEILING * composition.num_instances
    found = find_goodput(run, slo, 1.0, ceiling, effort, tolerance=TOLERANCE, start=start, floor=floor)
    if found.low <= 0:
        return 0.0, 0.0, found.num_simulated
    return found.interval.estimate, local_share(found.nearest(found.low).last), found.num_simulated


def measure_cell(count: int, workload: str, objective: str) -> list[Row]:
    """Every composition of ``count`` instances in one cell; of each kind the best one has a goodput for certain."""
    rows: list[Row] = []
    best: dict[str, float] = {}
    for composition in compositions(count):
        began = time.perf_counter()
        kind = composition.kind
        known = max(best.values(), default=0.0)
        rate, local, simulated = goodput(
            workload, OBJECTIVES[objective], composition, best.get(kind, 0.0), known or FIRST * CEILING * count
        )
        best[kind] = max(best.get(kind, 0.0), rate)
        rows.append(Row(count, workload, objective, kind, str(composition), round(rate, 3), round(local, 4), simulated))
        seconds = time.perf_counter() - began
        print(
            f"{count} {workload}, {objective}: {composition}: {rate:.1f}/s, {local:.0%} local, {seconds:.0f} s",
            flush=True,
        )
    return rows


def cells(rows: Sequence[Row]) -> dict[Cell, dict[str, Row]]:
    """The best composition of each kind, by cell in the order of the tables."""
    found: dict[Cell, dict[str, Row]] = {}
    order = [(count, w, o) for count in sorted({row.instances for row in rows}) for w in WORKLOADS for o in OBJECTIVES]
    for cell in order:
        for row in (row for row in rows if (row.instances, row.workload, row.objective) == cell):
            best = found.setdefault(cell, {}).setdefault(row.kind, row)
            if row.goodput > best.goodput:
                found[cell][row.kind] = row
    return {cell: kinds for cell, kinds in found.items() if len(kinds) == len(KINDS)}


def gain(kinds: dict[str, Row]) -> float:
    """The best hybrid's goodput over that of the better pure mode, less one."""
    return kinds["hybrid"].goodput / max(kinds["disaggregated"].goodput, kinds["mixed"].goodput) - 1


def report(rows: Sequence[Row]) -> str:
    """Markdown: what each kind reaches in each cell."""
    lines = [
        "# Hybrid deployments in simulation",
        "",
        f"Goodput in requests/s (90% of requests within TTFT and TPOT), rates {TOLERANCE:.0%} apart. Llama-3.1-8B, an",
        "H100 for each instance. Of every kind the best composition: P prefill, D decode, M mixed instances, and the",
        "token budget of the mixed ones. *Local* is the share of prompts computed where they were decoded. The last",
        "column is the hybrid against the better of the pure modes.",
        "",
        "| GPUs | lengths | objective | disaggregated | mixed | hybrid | local | against the better |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def entry(row: Row) -> str:
        return f"{row.goodput:.0f} ({row.composition})" if row.goodput else "none"

    for (count, workload, objective), kinds in cells(rows).items():
        slo, hybrid = OBJECTIVES[objective], kinds["hybrid"]
        values = [
            f"{count}",
            workload,
            f"{objective}: {slo.ttft * 1e3:g} ms, {slo.tpot * 1e3:g} ms",
            *(entry(kinds[kind]) for kind in KINDS),
            f"{hybrid.local:.0%}",
            f"{gain(kinds):+.1%}",
        ]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each kind in each cell, as a share of the better pure mode."""
    found = cells(rows)
    counts = sorted({count for count, _, _ in found})
    figure, panels = plt.subplots(len(counts), 1, figsize=(10, 3.2 * len(counts)), squeeze=False, layout="constrained")
    for panel, count in zip(panels[:, 0], counts, strict=True):
        here = [(cell, kinds) for cell, kinds in found.items() if cell[0] == count]
        for index, kind in enumerate(KINDS):
            heights = [
                kinds[kind].goodput / max(kinds["disaggregated"].goodput, kinds["mixed"].goodput) for _, kinds in here
            ]
            places = np.arange(len(here)) + 0.27 * (index - 1)
            panel.bar(places, heights, 0.25, label=kind, color=COLOURS[kind])
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xticks(
            range(len(here)), [f"{workload}\n{objective}" for (_, workload, objective), _ in here], fontsize=8
        )
        panel.set_ylabel("goodput / better pure mode")
        panel.set_title(f"{count} GPUs")
    panels[0, 0].legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure the cells asked for that are not there yet; then table and plot of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[2])
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--objective", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.csv"
    rows = read_rows(file, Row)
    known = {(row.instances, row.workload, row.objective) for row in rows}
    for cell in product(options.instances, options.workload, options.objective):
        if not options.report and cell not in known:
            rows += measure_cell(*cell)
            write_rows(file, Row, rows)
    (options.output / "report.md").write_text(report(rows), encoding="utf-8")
    draw(rows, options.output / "goodput.png")


if __name__ == "__main__":
    main()
