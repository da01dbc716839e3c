"""A plan as tables and sentences: the placement, what it promises, what limits it, and what else there was."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from distserve.core.config import SLO
from placement.outlook import Change, Outlook, Variant
from placement.plan import Evaluation, Interval, Percentiles, Plan, RatePoint
from placement.words import gigabytes, milliseconds, per_gpu, seconds, share, size

_MAX_LINKS = 4


def print_report(console: Console, plan: Plan, outlook: Outlook | None) -> None:
    """The whole answer for people: the placement, what it promises, what limits it, and what else there was."""
    problem, chosen = plan.problem, plan.chosen
    asked = "best goodput per GPU" if problem.rate is None else f"{problem.rate:g} requests/s on the fewest GPUs"
    sections: list[tuple[str, list[RenderableType]]] = [
        (
            f"Plan: {chosen.label}",
            [
                f"{_seats(plan)}, for {escape(problem.model.name)}; asked for: {asked}",
                f"step times from: {escape(problem.latency.source)}",
                _instances_table(chosen),
            ],
        ),
        ("Prediction", [_prediction(plan)]),
        ("What breaks first", [escape(outlook.breaks if outlook is not None else chosen.binding), *_phases(outlook)]),
    ]
    if any(link.load for link in chosen.links):
        sections.append(("Links", [_links_table(chosen)]))
    sections.append(("Rivals", _rivals(plan)))
    if outlook is not None and outlook.variants:
        sections.append(("What if", [_variants_table(outlook, problem.slo), *_size_words(plan, outlook)]))
    for title, parts in sections:
        console.print(f"\n[bold]{escape(title)}[/bold]")
        console.print(Group(*parts))
    for note in plan.notes:
        if problem.latency.source in note:
            continue  # said above
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    stats = plan.stats
    console.print(
        f"[dim]{stats.num_candidates} placements considered, {stats.num_pruned} ruled out by bounds, "
        f"{stats.num_simulated} simulated over {stats.num_requests:,} requests in {stats.seconds:.1f} s[/dim]"
    )


def _seats(plan: Plan) -> str:
    cluster, chosen = plan.problem.cluster, plan.chosen
    return (
        f"{chosen.num_gpus} of {cluster.num_gpus} x {cluster.gpu}, on {chosen.placement.num_nodes} of "
        f"{cluster.num_nodes} nodes"
    )


def _instances_table(chosen: Evaluation) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("instance", "shape", "node: GPUs"):
        table.add_column(heading, no_wrap=heading != "node: GPUs")
    for heading in ("busy", "batch", "KV memory", "peak", "KV sent", "received", "preempted"):
        table.add_column(heading, justify="right")
    for use in chosen.instances:
        nodes: dict[int, list[int]] = {}
        for gpu in use.gpus:
            nodes.setdefault(gpu.node, []).append(gpu.index)
        seats = "  ".join(f"{node}: {','.join(map(str, gpus))}" for node, gpus in nodes.items())
        table.add_row(
            escape(use.instance_id),
            f"tp {use.parallel.tp} x pp {use.parallel.pp}",
            seats,
            share(use.busy),
            f"{use.mean_batch:.1f}",
            size(use.kv_bytes),
            share(use.kv_share),
            gigabytes(use.kv_sent) if use.kv_sent else "-",
            gigabytes(use.kv_received) if use.kv_received else "-",
            str(use.num_preempted),
        )
    return table


def _prediction(plan: Plan) -> Group:
    slo, point = plan.problem.slo, plan.chosen.point
    table = Table(box=SIMPLE_HEAD, title=f"at {point.rate:.4g} requests/s", title_justify="left")
    table.add_column("")
    for heading in ("mean", "p50", "p90", "p99", "limit", "met by"):
        table.add_column(heading, justify="right")
    for name, values, limit, met in (
        ("TTFT", point.ttft, slo.ttft, point.ttft_attainment),
        ("TPOT", point.tpot, slo.tpot, point.tpot_attainment),
    ):
        table.add_row(f"{name}, ms", *_percentiles(values), milliseconds(limit), share(met))
    goodput = plan.chosen.goodput
    verdict = (
        f"[green]holds[/green]: the whole interval is at {slo.attainment:.0%} or above"
        if plan.holds
        else f"[yellow]not certain[/yellow]: the interval is not wholly at {slo.attainment:.0%} or above"
    )
    if not point.is_stable:
        verdict = f"[red]overloaded[/red]: {escape(point.instability)}"
    return Group(
        table,
        f"attainment {interval_of_share(point.attainment)} over {point.num_requests:,} requests "
        f"in {point.num_runs} runs; {verdict}",
        f"goodput {goodput.estimate:.4g} requests/s ({goodput.low:.4g} to {goodput.high:.4g}), "
        f"{per_gpu(plan.chosen.goodput_per_gpu)}",
    )


def _percentiles(values: Percentiles) -> list[str]:
    return [milliseconds(value) for value in (values.mean, values.p50, values.p90, values.p99)]


def interval_of_share(interval: Interval) -> str:
    """``93.1% (92.0% to 94.0%)``."""
    return f"{interval.estimate:.1%} (95% interval {interval.low:.1%} to {interval.high:.1%})"


def _phases(outlook: Outlook | None) -> list[RenderableType]:
    if outlook is None or not outlook.phases:
        return []
    table = Table(box=SIMPLE_HEAD, title="where a request's time goes, mean", title_justify="left")
    table.add_column("requests/s")
    for heading in ("queue", "prefill", "KV transfer", "wait", "decode", "miss TTFT", "miss TPOT"):
        table.add_column(heading, justify="right")
    for phases in outlook.phases:
        times = (phases.queue, phases.prefill, phases.transfer, phases.wait, phases.decode)
        table.add_row(
            f"{phases.rate:.4g}",
            *(seconds(time) for time in times),
            share(phases.missed_ttft),
            share(phases.missed_tpot),
        )
    return [table]


def _links_table(chosen: Evaluation) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("link")
    for heading in ("capacity", "mean load", "share", "in use"):
        table.add_column(heading, justify="right")
    ordered = sorted((link for link in chosen.links if link.load), key=lambda link: -link.share)
    for link in ordered[:_MAX_LINKS]:
        table.add_row(
            escape(link.name), gigabytes(link.capacity), gigabytes(link.load), share(link.share), share(link.busy)
        )
    if len(ordered) > _MAX_LINKS:
        table.caption = f"and {len(ordered) - _MAX_LINKS} less loaded ones"
    return table


def _rivals(plan: Plan) -> list[RenderableType]:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("placement")
    for heading in ("GPUs", "goodput", "per GPU", "attained", "at"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        ("chosen", plan.chosen),
        ("runner-up", plan.runner_up),
        ("best disaggregated", plan.disaggregated),
        ("best colocated", plan.colocated),
        ("best hybrid", plan.hybrid),
        ("as given", plan.paper),
    ]
    for name, found in rows:
        if found is not None and (name == "chosen" or found is not plan.chosen):
            point = found.point
            table.add_row(
                name,
                escape(found.label),
                str(found.num_gpus),
                f"{found.goodput.estimate:.3g}/s",
                f"{found.goodput_per_gpu:.3g}/s",
                _attained(point, plan.problem.slo),
                f"{point.rate:.3g}/s",
            )
    words = [_lost_by(plan), _colocated_words(plan), _hybrid_words(plan)]
    return [table, *(escape(text) for text in words if text)]


def _attained(point: RatePoint, slo: SLO) -> str:
    colour = "green" if point.holds(slo.attainment) else "red"
    unstable = "" if point.is_stable else ", overloaded"
    return f"[{colour}]{point.attainment.estimate:.1%}{unstable}[/{colour}]"


def _lost_by(plan: Plan) -> str:
    loser, winner = plan.runner_up, plan.chosen
    if loser is None:
        return "No other placement came into question."
    more_gpus = loser.num_gpus - winner.num_gpus
    apart = winner.goodput_per_gpu / loser.goodput_per_gpu - 1 if loser.goodput_per_gpu else math.inf
    overlap = " (their intervals overlap)" if winner.overlaps(loser) else ""
    if plan.problem.rate is not None and more_gpus > 0:
        return (
            f"The runner-up lost by {more_gpus} GPU{'s' if more_gpus > 1 else ''}: {loser.label} needs "
            f"{loser.num_gpus} where {winner.num_gpus} {'is' if winner.num_gpus == 1 else 'are'} enough."
        )
    if math.isinf(apart):
        return f"The runner-up, {loser.label}, reaches the objective at no rate that was tried."
    if apart < 0:
        why = (
            f"it takes {loser.num_gpus} GPUs on {loser.placement.num_nodes} nodes, not {winner.num_gpus} on "
            f"{winner.placement.num_nodes}"
        )
        if (loser.num_gpus, loser.placement.num_nodes) == (winner.num_gpus, winner.placement.num_nodes):
            why = "a hybrid is more to run"
        return f"The runner-up has {1 / (1 + apart) - 1:.1%} more goodput per GPU{overlap}; it lost because {why}."
    if apart < 0.01:
        return (
            f"The runner-up, {loser.label}, has the same goodput per GPU within 1%; ties go to fewer GPUs, then "
            "to fewer nodes."
        )
    return f"The runner-up, {loser.label}, lost by {apart:.1%} of goodput per GPU{overlap}."


def _colocated_words(plan: Plan) -> str:
    apart, together = plan.disaggregated, plan.colocated
    if apart is None or together is None:
        missing = "disaggregated" if apart is None else "colocated"
        return f"No {missing} placement reaches the objective on this cluster."
    if not together.goodput_per_gpu or not apart.goodput_per_gpu:
        return ""
    limited = f"The colocated placement is limited by: {together.binding}"
    if plan.problem.rate is not None:
        kinds = ((apart.num_gpus, "disaggregated"), (together.num_gpus, f"colocated ({together.policy.value})"))
        (fewer, better), (more, worse) = sorted(kinds, key=lambda kind: kind[0])
        if fewer == more:
            return f"Disaggregated and colocated placements both take {more} GPUs for the rate. {limited}"
        return f"At the rate asked for {worse} takes {more} GPUs where {better} takes {fewer}. {limited}"
    ratio = apart.goodput_per_gpu / together.goodput_per_gpu
    better, worse = ("Disaggregated", "colocated") if ratio >= 1 else ("Colocated", "disaggregated")
    policy = together.policy.value
    return (
        f"{better} serves {max(ratio, 1 / ratio):.2f} times the requests per GPU of {worse} "
        f"(colocated: {policy} mixed instances). {limited}"
    )


def _hybrid_words(plan: Plan) -> str:
    """Hybrids are looked at only where they may do better than both others; so none may have been measured."""
    others = [found for found in (plan.disaggregated, plan.colocated) if found is not None]
    if plan.hybrid is None:
        better = "holds the rate on fewer GPUs" if plan.problem.rate is not None else "serves more per GPU"
        searched = others and plan.problem.search.hybrid
        return f"No hybrid of them, prefill beside mixed instances, was found that {better}." if searched else ""
    best = max(others, key=lambda found: found.goodput_per_gpu, default=None)
    if best is None or not best.goodput_per_gpu:
        return ""
    ratio = plan.hybrid.goodput_per_gpu / best.goodput_per_gpu
    return f"The hybrid, prefill beside mixed instances, serves {ratio:.2f} times the requests per GPU of {best.label}."


def _variants_table(outlook: Outlook, slo: SLO) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("GPUs", "at", "attained", "TTFT p90", "TPOT p90", "goodput"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in Change:
        for variant in outlook.of(change):
            table.add_row(escape(variant.label), *_variant_cells(variant, slo))
        table.add_section()
    if outlook.goodput_tolerance:
        table.caption = f"goodput to within {outlook.goodput_tolerance:.0%}; latencies in ms"
    return table


def _variant_cells(variant: Variant, slo: SLO) -> list[str]:
    if variant.point is None:
        return [str(variant.num_gpus), "-", escape(variant.reason), "", "", ""]
    point = variant.point
    return [
        str(variant.num_gpus),
        f"{point.rate:.3g}/s",
        _attained(point, slo),
        milliseconds(point.ttft.p90),
        milliseconds(point.tpot.p90),
        "-" if variant.goodput is None else f"{variant.goodput:.3g}/s",
    ]


def _size_words(plan: Plan, outlook: Outlook) -> list[str]:
    """What the smallest steps in size do to the goodput, and whether any one instance may be lost."""
    return [escape(text) for text in (_step_words(plan, outlook), _loss_words(plan, outlook)) if text]


def _step_words(plan: Plan, outlook: Outlook) -> str:
    chosen = plan.chosen
    steps = []
    for variant in [*outlook.of(Change.SIZE), *outlook.of(Change.LOSS)]:
        if variant.goodput is not None and chosen.goodput.estimate:
            apart = variant.num_gpus - chosen.num_gpus
            gain = variant.goodput / chosen.goodput.estimate - 1
            steps.append(f"{variant.label} ({apart:+d} GPU{'' if abs(apart) == 1 else 's'}): {gain:+.0%}")
    if not steps:
        return ""
    smallest = min(len(instance.gpus) for instance in chosen.placement.instances)
    alone = (
        "" if smallest == 1 else f" A single GPU more or less is no instance of these shapes, which take {smallest}."
    )
    return f"Goodput with {'; '.join(steps)}.{alone}"


def _loss_words(plan: Plan, outlook: Outlook) -> str:
    losses = outlook.of(Change.LOSS)
    target = plan.problem.slo.attainment
    if not losses:
        return ""
    if any(variant.point is None for variant in losses):
        return "It is not N+1 safe: it has a single instance of a role, without which nothing is served."
    if all(variant.point is not None and variant.point.holds(target) for variant in losses):
        return "It is N+1 safe: the objective holds with any one instance lost."
    worst = min(losses, key=lambda variant: variant.goodput or 0.0)
    return (
        f"It is not N+1 safe: {worst.label} leaves a goodput of {worst.goodput or 0:.3g} of "
        f"{plan.chosen.goodput.estimate:.3g} requests/s."
    )
