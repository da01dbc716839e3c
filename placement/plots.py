"""PNG plots of a plan.

Axes begin at zero. Requests without a latency are not dropped: a distribution's curve ends at the share of offered
requests that got one. Every estimate is drawn with its 95% interval where it has one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distserve.bench.files import write_atomically
from distserve.core.config import SLO
from placement.candidates import Kind
from placement.drawing import draw_cluster
from placement.outlook import Change, Curve, Outlook, Sample, rivals
from placement.plan import Plan

_LIMIT = "#c51b3b"
_BOTH, _TTFT, _TPOT = "#222222", "#4c78a8", "#f58518"
_COLOURS = ("#222222", "#b279a2", "#54a24b", "#9d755d")
_KINDS = {Kind.DISAGGREGATED: _TTFT, Kind.COLOCATED: "#54a24b", Kind.HYBRID: "#e45756"}


def write_plots(directory: Path, plan: Plan, outlook: Outlook) -> list[Path]:
    """Write all plots of ``plan`` into ``directory``, which is there; returns their paths."""
    figures = {
        "gpus_over_goodput.png": plot_front(plan, outlook),
        "cluster.png": draw_cluster(plan.chosen.placement, outlook.flows, _title(plan)),
    }
    if any(curve.points for curve in outlook.curves):
        figures["attainment_over_rate.png"] = plot_attainment(plan, outlook)
    if outlook.samples:
        figures["latency.png"] = plot_latency(outlook.samples, plan.problem.slo, plan)
    written = []
    for name, figure in figures.items():
        path = directory / name
        write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=120))  # type: ignore[misc]
        written.append(path)
    return written


def _title(plan: Plan) -> str:
    return f"{plan.problem.model.name}: {plan.chosen.label}"


def plot_attainment(plan: Plan, outlook: Outlook) -> Figure:
    """Attainment over the rate per GPU, a panel per candidate: both bounds with the interval, and each bound alone."""
    slo = plan.problem.slo
    shown = [curve for curve in outlook.curves if curve.points]
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.2 * columns + 0.3, 3.7 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    furthest = max(curve.points[-1].rate / curve.evaluation.num_gpus for curve in shown)
    for panel, curve in zip(panels, shown, strict=False):
        _draw_curve(panel, curve, slo)
        panel.set_xlim(0, furthest * 1.03)
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for panel in panels[-columns:]:
        panel.set_xlabel("offered rate, requests/s per GPU")
    for panel in panels[::columns]:
        panel.set_ylabel("share of offered requests")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    figure.suptitle(
        f"{plan.problem.model.name} on {plan.problem.cluster.gpu}: share of requests with TTFT up to {slo.ttft:g} s "
        f"and TPOT up to {slo.tpot:g} s",
        fontsize=11,
    )
    return figure


def _draw_curve(axis: Axes, curve: Curve, slo: SLO) -> None:
    found, points = curve.evaluation, curve.points
    rates = np.array([point.rate for point in points]) / found.num_gpus
    both = np.array([point.attainment.estimate for point in points])
    axis.axhline(slo.attainment, color=_LIMIT, linestyle="--", linewidth=1.1, label=f"target {slo.attainment:.0%}")
    axis.axvline(found.goodput_per_gpu, color="#54a24b", linewidth=1.3, label="goodput, and its 95% interval", zorder=1)
    axis.axvspan(
        found.goodput.low / found.num_gpus,
        found.goodput.high / found.num_gpus,
        color="#54a24b",
        alpha=0.15,
        linewidth=0,
    )
    # Wide and beneath: where one phase alone decides, its curve is the joint one.
    for values, colour, label in (
        ([point.ttft_attainment for point in points], _TTFT, "TTFT met (prefill)"),
        ([point.tpot_attainment for point in points], _TPOT, "TPOT met (decode)"),
    ):
        axis.plot(rates, values, color=colour, linewidth=4.5, alpha=0.55, solid_capstyle="butt", label=label)
    axis.errorbar(
        rates,
        both,
        yerr=(
            [max(point.attainment.estimate - point.attainment.low, 0.0) for point in points],
            [max(point.attainment.high - point.attainment.estimate, 0.0) for point in points],
        ),
        fmt="-o",
        markersize=3.5,
        capsize=2.5,
        color=_BOTH,
        linewidth=1.2,
        label="both met, 95% interval",
    )
    unstable = np.array([not point.is_stable for point in points])
    # Drawn even when empty, so that the first panel's legend serves them all.
    axis.plot(
        rates[unstable],
        both[unstable],
        linestyle="none",
        marker="x",
        markersize=9,
        color=_LIMIT,
        label="overloaded: the backlog grows",
    )
    axis.set_title(
        f"{curve.name}: {found.label}\n{found.num_gpus} GPUs, goodput {found.goodput.estimate:.3g}/s "
        f"= {found.goodput_per_gpu:.3g}/s per GPU",
        fontsize=9.5,
    )
    axis.set_ylim(0, 1.04)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)


def plot_front(plan: Plan, outlook: Outlook) -> Figure:
    """GPUs over goodput: every measured placement, numbered, and the front of those no other beats in both."""
    named = rivals(plan)
    figure = Figure(figsize=(8.5, 5.2 + 0.17 * len(named)), layout="constrained")
    axis = figure.subplots()
    points = [(found.goodput.estimate, found.num_gpus) for _, found in named]
    resized = [*outlook.of(Change.SIZE), *outlook.of(Change.LOSS)]
    sizes = [(variant.goodput, variant.num_gpus) for variant in resized if variant.goodput]
    front = pareto_front(points + sizes)
    most = max((goodput for goodput, _ in points + sizes), default=1.0)
    # Goodput x to the right of a point needs the next point's GPUs: the front rises at each point.
    xs = [0.0, *(goodput for goodput, _ in front)]
    ys = [front[0][1], *(gpus for _, gpus in front)]
    axis.step(xs, ys, where="pre", color="0.55", linewidth=1.4, label="fewest GPUs of those measured", zorder=1)
    if sizes:
        axis.plot(
            [goodput for goodput, _ in sizes],
            [gpus for _, gpus in sizes],
            linestyle="none",
            marker="o",
            markerfacecolor="white",
            color=_BOTH,
            label="the chosen shapes, an instance more or less",
            zorder=2,
        )
    shown: set[str] = set()
    for name, found in named:
        kind = f"chosen, {found.kind}" if name == "chosen" else str(found.kind)
        axis.errorbar(
            found.goodput.estimate,
            found.num_gpus,
            xerr=[
                [max(found.goodput.estimate - found.goodput.low, 0)],
                [max(found.goodput.high - found.goodput.estimate, 0)],
            ],
            fmt="*" if name == "chosen" else "s",
            markersize=15 if name == "chosen" else 7,
            color=_KINDS[found.kind],
            capsize=3,
            label=None if kind in shown else f"{kind}, 95% interval",
            zorder=3,
        )
        shown.add(kind)
    _number_points(axis, points)
    if plan.problem.rate is not None:
        axis.axvline(plan.problem.rate, color=_LIMIT, linestyle="--", linewidth=1.1, label="rate asked for")
    axis.set_xlim(0, max(most, *(found.goodput.high for _, found in named), plan.problem.rate or 0) * 1.08)
    axis.set_ylim(0, max(gpus for _, gpus in points + sizes) * 1.3 + 0.5)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("GPUs")
    lines = [f"{number}  {name}: {found.label}" for number, (name, found) in enumerate(named, start=1)]
    axis.set_xlabel("goodput, requests/s\n\n" + "\n".join(lines), fontsize=8.5, linespacing=1.35)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    axis.set_title(f"{plan.problem.model.name} on {plan.problem.cluster.gpu}: GPUs over goodput", fontsize=11)
    return figure


def pareto_front(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The points (goodput, GPUs) that no other beats in both, by goodput."""
    front: list[tuple[float, int]] = []
    for goodput, gpus in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or gpus < front[-1][1]:
            front.append((goodput, gpus))
    return front[::-1]


def _number_points(axis: Axes, points: Sequence[tuple[float, int]]) -> None:
    """Numbers beneath the points; those that lie on one another share theirs."""
    widest = max(goodput for goodput, _ in points) or 1.0
    groups: list[tuple[float, int, list[int]]] = []
    for number, (goodput, gpus) in sorted(enumerate(points, start=1), key=lambda item: item[1]):
        near = [group for group in groups if group[1] == gpus and goodput - group[0] < 0.06 * widest]
        if near:
            near[0][2].append(number)
        else:
            groups.append((goodput, gpus, [number]))
    for goodput, gpus, numbers in groups:
        axis.annotate(
            ", ".join(map(str, sorted(numbers))),
            (goodput, gpus),
            xytext=(0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            zorder=5,  # a point of one GPU less may be where the number is
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def plot_latency(samples: Sequence[Sample], slo: SLO, plan: Plan) -> Figure:
    """Cumulative distributions of TTFT and TPOT of the chosen placement and rivals, with the SLO's limits."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label, limit, attribute in (
        (axes[0], "TTFT (arrival to first token), s", slo.ttft, "ttft"),
        (axes[1], "TPOT, s per token", slo.tpot, "tpot"),
    ):
        furthest = 1.6 * limit
        for sample, colour in zip(samples, _COLOURS, strict=False):
            values = getattr(sample, attribute)
            answered = np.sort(values[np.isfinite(values)])
            if not len(answered):
                continue
            heights = np.arange(1, len(answered) + 1) / len(values)
            axis.step(
                np.concatenate([[0, answered[0]], answered]),
                np.concatenate([[0, 0], heights]),
                where="post",
                color=colour,
                linewidth=1.8 if sample is samples[0] else 1.2,
                label=f"{sample.label}, {sample.rate:.3g}/s (n={len(values):,})",
            )
            furthest = max(furthest, float(np.quantile(answered, 0.95)))
        axis.axvline(limit, color=_LIMIT, linestyle="--", linewidth=1.2, label="limit of the SLO")
        axis.axhline(slo.attainment, color=_LIMIT, linestyle=":", linewidth=1)
        # Beyond three times the limit a miss is a miss; the rest of a tail would squeeze what matters.
        shown = min(furthest, 3 * limit)
        beyond = max(float(np.nansum(getattr(sample, attribute) > shown)) / len(sample.ttft) for sample in samples)
        tail = f"\n(the axis ends before the slowest {beyond:.1%} of a curve)" if beyond > 0 else ""
        axis.set(xlabel=label + tail, xlim=(0, shown), ylim=(0, 1.02))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
        axis.annotate(
            f"target {slo.attainment:.0%}",
            (0.99, slo.attainment),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            ha="right",
            va="top",
            color=_LIMIT,
        )
    axes[0].set_ylabel("share of offered requests")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    at = "the rate asked for" if plan.problem.rate is not None else "equal rates per GPU"
    figure.suptitle(f"{_title(plan)}: latencies at {at}", fontsize=11)
    return figure
