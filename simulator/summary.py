"""What a simulated run amounts to: figures for people and, the same ones, as JSON.

Latency distributions are over the requests answered; attainment is over all that were offered. Requests that arrive
before the end of the warm-up are in neither. Use of instances and links is over the whole run.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distserve.bench.metrics import Attainment, Distribution, wilson_interval
from distserve.core.config import SLO
from distserve.core.topology import Placement
from simulator.results import Simulation

SCHEMA = "distserve-simulate/1"
_MAX_LINKS = 8
_REASONS = {"400": "400: longer than an instance takes", "503": "503: no instance, or lost too often"}


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """``busy``: share of the run its busiest stage worked. ``peak_kv``: share of its KV blocks in use at the most.

    Of ``num_queried_tokens`` looked up in the prefix cache ``num_hit_tokens`` were there: not computed, or on a decode
    instance not pulled.
    """

    instance_id: str
    role: str
    tp: int
    pp: int
    gpus: tuple[tuple[int, int], ...]
    busy: float
    num_steps: int
    mean_batch: float
    peak_kv: float
    num_kv_blocks: int
    num_preempted: int
    num_hit_tokens: int
    num_queried_tokens: int


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A link that carried anything. ``load``: mean bytes/s over the run; ``busy``: share of it with a flow on it."""

    name: str
    capacity: float
    num_bytes: float
    load: float
    busy: float


@dataclass(frozen=True)
class RunSummary:
    """Figures of one run; rates per second between the first and the last counted arrival, throughputs to the end.

    ``goodput_per_gpu`` is requests/s that met the objective for each GPU. ``unfinished`` were under way at the end,
    ``failures`` counts the failed ones by HTTP status. ``backlog`` is the mean number of requests in the system while
    the middle and while the last third arrived: a run begins empty, so its first third says nothing.
    """

    num_offered: int
    num_answered: int
    num_shed: int
    num_failed: int
    failures: dict[str, int]
    num_unfinished: int
    num_preempted: int
    num_resubmitted: int
    offered_rate: float
    request_throughput: float
    output_token_throughput: float
    duration: float
    backlog: tuple[float, float]
    ttft: Distribution
    tpot: Distribution
    latency: Distribution
    migration: Distribution
    attainment: Attainment | None
    goodput_per_gpu: float | None
    instances: tuple[InstanceFigures, ...]
    links: tuple[LinkFigures, ...]

    @property
    def backlog_grows(self) -> bool:
        """By three standard deviations of a steady backlog, and 1.3 times; one that grows evenly does by 1.67."""
        middle, last = self.backlog
        return last > 1.3 * middle and last - middle > 3 * math.sqrt(max(middle, 1.0))


def summarise(simulation: Simulation, placement: Placement, slo: SLO | None, warmup: float = 0.0) -> RunSummary:
    """The figures of ``simulation``, whose instances are those of ``placement``."""
    timelines = simulation.timelines
    counted: NDArray[np.bool_] = timelines.arrival >= warmup
    status = timelines.status[counted]
    ok = counted & (timelines.status == 200)
    num = int(counted.sum())
    arrivals = timelines.arrival[counted]
    begin = float(arrivals[0]) if num else 0.0
    end = float(np.nanmax(timelines.finish[ok])) if ok.any() else simulation.duration
    seconds = max(end - begin, 1e-9)
    attainment = None if slo is None or not num else _attainment(simulation, counted, slo)
    span = float(arrivals[-1]) - begin if num else 0.0
    failures = dict(sorted(Counter(str(code) for code in status.tolist() if code not in {0, 200, 429}).items()))
    moved = timelines.migration_end[ok] - timelines.migration_start[ok]
    return RunSummary(
        num_offered=num,
        num_answered=int((status == 200).sum()),
        num_shed=int((status == 429).sum()),
        num_failed=sum(failures.values()),
        failures=failures,
        num_unfinished=int((status == 0).sum()),
        num_preempted=sum(usage.num_preempted for usage in simulation.instances),
        num_resubmitted=int((timelines.num_attempts[counted] > 1).sum()),
        offered_rate=(num - 1) / span if span > 0 else 0.0,
        request_throughput=int(ok.sum()) / seconds,
        output_token_throughput=int(timelines.output_tokens[ok].sum()) / seconds,
        duration=simulation.duration,
        backlog=_backlog(simulation, warmup),
        ttft=Distribution.of(timelines.ttft[ok]),
        tpot=Distribution.of(timelines.tpot[ok & (timelines.output_tokens > 1)]),
        latency=Distribution.of(timelines.latency[ok]),
        migration=Distribution.of(moved[np.isfinite(moved)]),
        attainment=attainment,
        goodput_per_gpu=None if attainment is None else attainment.both * num / seconds / placement.num_gpus,
        instances=_instances(simulation, placement),
        links=_links(simulation),
    )


def _backlog(simulation: Simulation, warmup: float) -> tuple[float, float]:
    """Mean requests in the system over the middle and the last third of the counted arrivals' span."""
    timelines = simulation.timelines
    finish = np.where(np.isnan(timelines.finish), simulation.duration, timelines.finish)
    # Those that are refused or fail leave at an unknown time, soon: they are no backlog.
    stays = (timelines.status == 200) | (timelines.status == 0)
    arrival, finish = timelines.arrival[stays], finish[stays]
    if not len(arrival) or arrival[-1] <= warmup:
        return 0.0, 0.0
    third = (float(arrival[-1]) - warmup) / 3

    def mean(begin: float, end: float) -> float:
        inside = np.minimum(finish, end) - np.maximum(arrival, begin)
        return float(np.maximum(inside, 0.0).sum()) / (end - begin)

    return mean(warmup + third, warmup + 2 * third), mean(warmup + 2 * third, warmup + 3 * third)


def _attainment(simulation: Simulation, counted: NDArray[np.bool_], slo: SLO) -> Attainment:
    timelines = simulation.timelines
    num = int(counted.sum())

    def share(ttft: float, tpot: float) -> float:
        return float(timelines.meets(SLO(ttft, tpot))[counted].mean())

    both = int(timelines.meets(slo)[counted].sum())
    low, high = wilson_interval(both, num)
    return Attainment(both / num, share(slo.ttft, math.inf), share(math.inf, slo.tpot), low, high, num)


def _instances(simulation: Simulation, placement: Placement) -> tuple[InstanceFigures, ...]:
    duration = max(simulation.duration, 1e-9)
    return tuple(
        InstanceFigures(
            instance_id=usage.instance_id,
            role=usage.role.value,
            tp=placed.spec.parallel.tp,
            pp=placed.spec.parallel.pp,
            gpus=tuple((gpu.node, gpu.index) for gpu in placed.gpus),
            busy=usage.busy / duration,
            num_steps=usage.num_steps,
            mean_batch=usage.mean_batch,
            peak_kv=usage.peak_kv_blocks / usage.num_kv_blocks,
            num_kv_blocks=usage.num_kv_blocks,
            num_preempted=usage.num_preempted,
            num_hit_tokens=usage.num_hit_tokens,
            num_queried_tokens=usage.num_queried_tokens,
        )
        for usage, placed in zip(simulation.instances, placement.instances, strict=True)
    )


def _links(simulation: Simulation) -> tuple[LinkFigures, ...]:
    duration = max(simulation.duration, 1e-9)
    used = (link for link in simulation.links if link.num_bytes > 0)
    figures = (
        LinkFigures(link.name, link.capacity, link.num_bytes, link.num_bytes / duration, link.busy / duration)
        for link in used
    )
    return tuple(sorted(figures, key=lambda link: (-link.load / link.capacity, link.name)))


def to_document(summary: RunSummary, run: dict[str, Any], slo: SLO | None) -> dict[str, Any]:
    """The JSON document: ``run`` says what was simulated; absent figures are null, an infinite limit too."""
    return {
        "schema": SCHEMA,
        "run": run,
        "slo": None if slo is None else asdict(slo),
        "summary": asdict(summary),
    }


def print_summary(console: Console, summary: RunSummary, run: dict[str, Any], slo: SLO | None) -> None:
    """Print the figures as tables."""
    console.print(f"[bold]{escape(run['model'])}[/bold] on {escape(run['cluster'])}: {escape(run['placement'])}")
    console.print(f"step times: {escape(run['latency_source'])}")
    console.print(f"workload: {escape(run['workload'])}")
    for note in run["notes"]:
        console.print(f"note: {escape(note)}")
    lost = [
        f"{num} {what}"
        for num, what in (
            (summary.num_shed, "shed"),
            *((num, f"failed with {_REASONS.get(code, code)}") for code, num in summary.failures.items()),
            (summary.num_unfinished, "under way at the end"),
            (summary.num_resubmitted, "resubmitted"),
            (summary.num_preempted, "preemptions"),
        )
        if num
    ]
    console.print(
        f"\n{summary.num_answered:,} of {summary.num_offered:,} requests answered"
        f"{' (' + ', '.join(lost) + ')' if lost else ''}; offered {summary.offered_rate:.3g}/s, answered "
        f"{summary.request_throughput:.3g}/s, {summary.output_token_throughput:,.0f} output tokens/s, in "
        f"{summary.duration:,.1f} s"
    )
    for verb, roles in (("computed", {"prefill", "mixed"}), ("pulled", {"decode"})):
        cached = [figures for figures in summary.instances if figures.role in roles and figures.num_queried_tokens]
        hits, queried = (sum(getattr(f, name) for f in cached) for name in ("num_hit_tokens", "num_queried_tokens"))
        if hits:
            console.print(f"{hits:,} of {queried:,} tokens ({hits / queried:.1%}) were there and not {verb} again")
    if summary.backlog_grows:
        middle, last = summary.backlog
        console.print(
            f"[bold]The backlog grows[/bold]: {middle:.1f} requests in the system during the middle third of the "
            f"arrivals, {last:.1f} during the last. Overloaded, or the load itself rose: a longer run may look worse."
        )
    if summary.attainment is not None and slo is not None:
        found = summary.attainment
        verdict = "met" if found.low >= slo.attainment else ("missed" if found.high < slo.attainment else "undecided")
        console.print(
            f"[bold]attainment {found.both:.1%}[/bold] (95% interval {found.low:.1%} to {found.high:.1%}; target "
            f"{slo.attainment:.0%}: {verdict}); TTFT up to {slo.ttft:g} s {found.ttft:.1%}, TPOT up to {slo.tpot:g} s "
            f"{found.tpot:.1%}; goodput per GPU {summary.goodput_per_gpu:.3g}/s"
        )
    console.print(_latency_table(summary))
    console.print(_instance_table(summary))
    if summary.links:
        console.print(_link_table(summary))
    elif len(summary.instances) > 1:
        console.print("No link carried anything.")


def _latency_table(summary: RunSummary) -> Table:
    table = Table("seconds", "mean", "p50", "p90", "p95", "p99", "max", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = (
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("latency", summary.latency),
        ("KV pull", summary.migration),
    )
    for name, found in rows:
        if found.num:
            values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
            table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values))
    return table


def _instance_table(summary: RunSummary) -> Table:
    table = Table("instance", "shape", "GPUs (node:index)", box=SIMPLE_HEAD)
    for name in ("busy", "steps", "mean batch", "KV peak", "KV blocks", "preempted"):
        table.add_column(name, justify="right")
    for figures in summary.instances:
        table.add_row(
            figures.instance_id,
            f"TP{figures.tp} PP{figures.pp}",
            " ".join(f"{node}:{index}" for node, index in figures.gpus),
            f"{figures.busy:.1%}",
            f"{figures.num_steps:,}",
            f"{figures.mean_batch:.1f}",
            f"{figures.peak_kv:.1%}",
            f"{figures.num_kv_blocks:,}",
            str(figures.num_preempted),
        )
    return table


def _link_table(summary: RunSummary) -> Table:
    shown = summary.links[:_MAX_LINKS]
    rest = len(summary.links) - len(shown)
    table = Table("link", box=SIMPLE_HEAD, caption=f"and {rest} less used" if rest else None, caption_justify="left")
    for name in ("capacity, GB/s", "mean load, GB/s", "used", "with a flow", "carried, GB"):
        table.add_column(name, justify="right")
    for link in shown:
        table.add_row(
            link.name,
            f"{link.capacity / 1e9:.3g}",
            f"{link.load / 1e9:.3g}",
            f"{link.load / link.capacity:.1%}",
            f"{link.busy:.1%}",
            f"{link.num_bytes / 1e9:.3g}",
        )
    return table
