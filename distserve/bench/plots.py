"""PNG plots of a result.

Axes begin at zero, and requests without a latency are not dropped: a distribution's curve ends at the share of offered
requests that got one.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distserve.bench.files import write_atomically
from distserve.bench.goodput import Goodput
from distserve.bench.metrics import SLO, attainment, counted, in_flight
from distserve.bench.records import RequestRecord, Status
from distserve.bench.session import Measured, Outcome

_LIMIT: dict[str, Any] = {"color": "tab:red", "linestyle": "--", "linewidth": 1.2}
_MAX_CURVES = 8


def write_plots(directory: Path, outcome: Outcome, slo: SLO | None, warmup: float, title: str) -> list[Path]:
    """Write the plots that ``outcome`` has data for; returns their paths."""
    written = []

    def save(name: str, figure: Figure) -> None:
        path = directory / name
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
        written.append(path)

    runs = [measured for measured in outcome.runs if counted(measured.run.records, warmup)]
    if not runs:
        return written
    save("latency.png", plot_latency(runs, slo, warmup, title))
    for number, measured in enumerate(runs):
        name = "requests_over_time.png" if len(runs) == 1 else f"requests_over_time_{number:02d}.png"
        save(name, plot_requests_over_time(measured, slo, warmup, title))
    if slo is not None and len({measured.rate for measured in runs if measured.rate is not None}) > 1:
        save("attainment_over_rate.png", plot_attainment_over_rate(runs, outcome.goodput, slo, warmup, title))
    return written


def plot_latency(runs: Sequence[Measured], slo: SLO | None, warmup: float, title: str) -> Figure:
    """Cumulative distributions of TTFT and TPOT, one curve per run, with the SLO's limits."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shown = sorted(runs, key=lambda m: m.rate or 0)
    if len(shown) > _MAX_CURVES:
        picks = np.linspace(0, len(shown) - 1, _MAX_CURVES).round().astype(int)
        shown = [shown[i] for i in picks]
    parts: list[tuple[Axes, str, Callable[[RequestRecord], float | None], float | None]] = [
        (axes[0], "TTFT (scheduled arrival to first token), s", lambda r: r.ttft, _finite(slo.ttft if slo else None)),
        (axes[1], "TPOT, s per token", lambda r: r.tpot, _finite(slo.tpot if slo else None)),
    ]
    for axis, label, value, limit in parts:
        longest = 0.0
        for number, measured in enumerate(shown):
            colour = colormaps["viridis"](0.9 * number / max(len(shown) - 1, 1))
            # A one-token output has no TPOT; a request that failed has none either, but counts.
            offered = [
                r for r in counted(measured.run.records, warmup) if r.status is not Status.OK or value(r) is not None
            ]
            values = np.sort([v for r in offered if r.status is Status.OK and (v := value(r)) is not None])
            if not len(values):
                continue
            longest = max(longest, float(values[-1]))
            heights = np.arange(1, len(values) + 1) / len(offered)
            axis.step(
                np.concatenate([[0, values[0]], values]),
                np.concatenate([[0, 0], heights]),
                where="post",
                color=colour,
                label=f"{measured.label} (n={len(offered)}{', cut off' if measured.run.stopped else ''})",
            )
        if limit is not None:
            axis.axvline(limit, label=f"SLO {limit:g} s", **_LIMIT)
        axis.set(xlabel=label, xlim=(0, max(longest, limit or 0) * 1.05 or 1), ylim=(0, 1.02))
        axis.locator_params(axis="x", nbins=7)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right")
    if slo is not None:
        for axis in axes:
            axis.axhline(slo.attainment, color="tab:red", linestyle=":", linewidth=1)
            axis.annotate(
                f"target {slo.attainment:.0%}",
                (0.99, slo.attainment),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                ha="right",
                va="top",
            )
    axes[0].set_ylabel("share of offered requests")
    figure.suptitle(f"Latency distributions: {title}")
    return figure


def _finite(limit: float | None) -> float | None:
    return limit if limit is not None and limit < math.inf else None


def plot_attainment_over_rate(
    runs: Sequence[Measured], goodput: Goodput | None, slo: SLO, warmup: float, title: str
) -> Figure:
    """Attainment against the rate, with 95% intervals; for a search also its verdicts and its bracket."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    if goodput is not None:
        _draw_probes(axis, goodput)
        upper = goodput.high if goodput.high is not None else goodput.low
        axis.axvspan(
            goodput.low,
            upper,
            color="tab:green",
            alpha=0.15,
            label=f"goodput in [{goodput.low:.3g}, {upper:.3g})",
        )
    rated = sorted((m for m in runs if m.rate is not None), key=lambda m: m.rate or 0)
    rates, shares, below, above = [], [], [], []
    for measured in rated:
        met = attainment(counted(measured.run.records, warmup), slo)
        if measured.rate is None or met is None or measured.run.stopped:
            continue
        rates.append(measured.rate)
        shares.append(met.both)
        below.append(max(met.both - met.low, 0.0))
        above.append(max(met.high - met.both, 0.0))
    axis.errorbar(
        rates,
        shares,
        yerr=(below, above),
        fmt="o-",
        capsize=3,
        color="tab:blue",
        label="TTFT and TPOT met, 95% interval",
    )
    axis.axhline(slo.attainment, label=f"target {slo.attainment:.0%}", **_LIMIT)
    axis.set(xlabel="offered rate, requests/s", ylabel="attainment (share of offered requests)")
    axis.set_ylim(0, 1.03)
    axis.set_xlim(0, max(m.rate or 0 for m in rated) * 1.05)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    axis.set_title(f"Attainment over rate, {title}\nSLO: {slo} of requests", fontsize=10)
    return figure


def _draw_probes(axis: Axes, goodput: Goodput) -> None:
    early = [probe for probe in goodput.probes if probe.decided_early]
    if early:
        axis.plot(
            [p.rate for p in early],
            [p.attainment for p in early],
            linestyle="none",
            marker="v",
            color="tab:orange",
            label="stopped early: at most this",
        )
    unstable = [p for p in goodput.probes if p.stability is not None and not p.stability.stable]
    if unstable:
        axis.plot(
            [p.rate for p in unstable],
            [p.attainment for p in unstable],
            linestyle="none",
            marker="x",
            markersize=11,
            color="tab:red",
            label="unstable: backlog or TTFT grows",
        )


def plot_requests_over_time(measured: Measured, slo: SLO | None, warmup: float, title: str) -> Figure:
    """Requests in flight, arrivals and completions per second, and each request's TTFT, against time."""
    records = [r for r in measured.run.records if not math.isnan(r.end)]
    end = max(r.end for r in records)
    figure = Figure(figsize=(11, 8), layout="constrained")
    flight, flow, first = figure.subplots(3, 1, sharex=True)

    times, level = in_flight(records)
    flight.step(times, level, where="post", color="tab:blue")
    flight.set_ylabel("requests in flight")

    num_bins = int(np.clip(len(records) / 10, 10, 120))
    edges = np.linspace(0, end, num_bins + 1)
    width = edges[1] - edges[0]
    arrived, _ = np.histogram([r.scheduled for r in records], edges)
    answered, _ = np.histogram([r.end for r in records if r.status is Status.OK], edges)
    flow.stairs(arrived / width, edges, label="arrivals", color="tab:gray")
    flow.stairs(answered / width, edges, label="answers completed", color="tab:green")
    flow.set_ylabel(f"requests/s\n(bins of {width:.2g} s)")
    flow.legend(fontsize=8, loc="upper right")

    ok = [r for r in records if r.status is Status.OK and r.ttft is not None]
    bad = [r for r in records if r.status in (Status.FAILED, Status.SHED, Status.TIMEOUT)]
    first.scatter([r.scheduled for r in ok], [r.ttft or 0 for r in ok], s=6, color="tab:blue", label="TTFT")
    if bad:
        first.scatter(
            [r.scheduled for r in bad],
            [0] * len(bad),
            s=20,
            marker="x",
            color="tab:red",
            label="shed, failed, timed out",
        )
    if slo is not None and slo.ttft < math.inf:
        first.axhline(slo.ttft, label=f"SLO {slo.ttft:g} s", **_LIMIT)
    first.set_ylabel("TTFT, s, by arrival")
    first.set_xlabel("time since the run's start, s")
    first.legend(fontsize=8, loc="upper right")
    for axis in (flight, flow, first):
        # Headroom, so that no legend hides data.
        axis.set_ylim(0, axis.get_ylim()[1] * 1.25)
        axis.grid(alpha=0.3)
        if warmup:
            axis.axvspan(0, warmup, color="0.85", zorder=0)
    first.set_xlim(0, end)
    shaded = "; shaded: warm-up, not counted" if warmup else ""
    figure.suptitle(f"Requests over time: {measured.label}, {title}{shaded}")
    return figure
