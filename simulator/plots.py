"""PNG plots of a simulated run.

Axes begin at zero, and requests without a latency are not dropped: a distribution's curve ends at the share of offered
requests that got one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distserve.bench.files import write_atomically
from distserve.core.config import SLO, Role
from simulator.load import BatchRecorder, kv_use, stages
from simulator.model import ClusterModel
from simulator.results import Floats, Simulation
from simulator.simulation import Fault

_LIMIT = "tab:red"
_MAX_LINES = 6
"""More instances of a role than this are drawn as their mean, least and most."""
_COLOURS = {Role.PREFILL: "Blues", Role.DECODE: "Oranges", Role.MIXED: "Greens"}


def write_plots(
    directory: Path,
    simulation: Simulation,
    model: ClusterModel,
    batches: BatchRecorder,
    slo: SLO | None,
    title: str,
    faults: Sequence[Fault] = (),
) -> list[Path]:
    """Write all plots into ``directory``, which is there; returns their paths."""
    figures = {
        "latency.png": plot_latency(simulation, slo, title),
        "load.png": plot_load(simulation, model, batches, title, faults),
    }
    written = []
    for name, figure in figures.items():
        path = directory / name
        write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=120))  # type: ignore[misc]
        written.append(path)
    return written


def plot_latency(simulation: Simulation, slo: SLO | None, title: str) -> Figure:
    """Cumulative distributions of TTFT, TPOT and latency over the requests offered, with the objective's limits."""
    timelines = simulation.timelines
    ok = timelines.status == 200
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        (axes[0], "TTFT (arrival to first token), s", timelines.ttft, slo.ttft if slo else None),
        (axes[1], "TPOT (one-token answers: 0), s per token", timelines.tpot, slo.tpot if slo else None),
        (axes[2], "latency (arrival to last token), s", timelines.latency, None),
    )
    for axis, label, values, limit in panels:
        answered = np.sort(values[ok])
        heights = np.arange(1, len(answered) + 1) / max(len(timelines), 1)
        axis.step(np.concatenate([[0.0], answered]), np.concatenate([[0.0], heights]), where="post", color="tab:blue")
        longest = float(answered[-1]) if len(answered) else 1.0
        shown = max(longest, limit or 0.0)
        beyond = ""
        if limit is not None:
            axis.axvline(limit, color=_LIMIT, linestyle="--", linewidth=1.2)
            share = float((answered <= limit).sum()) / max(len(timelines), 1)
            axis.set_title(f"SLO {limit:g} s: met by {share:.1%}", fontsize=10, color=_LIMIT)
            enough = max(6 * limit, 1.1 * float(np.quantile(answered, 0.95)) if len(answered) else 0.0)
            if longest > enough:
                # A long tail would squeeze what matters; the axis says what it leaves out.
                shown = enough
                beyond = f"\n({(answered > shown).mean():.1%} are beyond the axis, up to {longest:.3g} s)"
        axis.set(xlabel=label + beyond, xlim=(0, shown * 1.05 or 1.0), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    if slo is not None:
        for axis in axes[:2]:
            axis.axhline(slo.attainment, color=_LIMIT, linestyle=":", linewidth=1)
        axes[0].annotate(
            f"target {slo.attainment:.0%} (of both)",
            (0.01, slo.attainment),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=_LIMIT,
            va="bottom",
        )
    axes[0].set_ylabel("share of offered requests")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(f"Simulated latency: {title} (n={len(timelines):,})", fontsize=11)
    return figure


def plot_load(
    simulation: Simulation, model: ClusterModel, batches: BatchRecorder, title: str, faults: Sequence[Fault] = ()
) -> Figure:
    """Over time: requests by stage, batch sizes, and KV memory in use, by instance; faults as lines.

    Timelines have a request's last attempt alone: one that was resubmitted waits until then, and holds no memory. Where
    there are such requests the plot says so.
    """
    num_again = int((simulation.timelines.num_attempts > 1).sum())
    again = f"\n({num_again:,} came again, and wait\nuntil their last attempt)" if num_again else ""
    end = max(simulation.duration, 1e-9)
    figure = Figure(figsize=(12, 9), layout="constrained")
    requests, sizes, memory = figure.subplots(3, 1, sharex=True)
    found = stages(simulation.timelines, end)
    requests.stackplot(
        found.times,
        found.waiting,
        found.prefill,
        found.moving,
        found.decode,
        labels=("waiting for prefill" + again, "prefill", "first token out, waiting for decode", "decode"),
        colors=("tab:red", "tab:blue", "tab:gray", "tab:orange"),
        alpha=0.75,
        linewidth=0,
    )
    requests.set_ylabel("requests")
    times = batches.times
    grid = found.times
    for role in Role:
        indices = [i for i, instance in enumerate(model.instances) if instance.spec.role is role]
        names = [model.instances[i].spec.instance_id for i in indices]
        inside = times <= end
        _draw(sizes, role, names, times[inside], np.array([batches.batch(name)[inside] for name in names]))
        shares = np.array([kv_use(simulation, model.instances[i], i, grid) for i in indices])
        _draw(memory, role, names, grid, shares)
    sizes.set_ylabel(f"sequences in the step under way\n(mean over {batches.width:.3g} s, idle: 0)")
    memory.set_ylabel("KV memory held by requests" + "\n(in their last attempts)" * bool(num_again))
    memory.yaxis.set_major_formatter(PercentFormatter(1.0))
    memory.set_xlabel("time since the run's start, s")
    for fault in faults:
        for axis in (requests, sizes, memory):
            axis.axvline(fault.time, color="black", linestyle="--", linewidth=1)
        requests.annotate(
            str(fault),
            (fault.time, 0.99),
            xytext=(3, 0),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            fontsize=8,
            va="top",
        )
    for axis in (requests, sizes, memory):
        axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    memory.set_xlim(0, end)
    figure.suptitle(f"Simulated load: {title}", fontsize=11)
    return figure


def _draw(axis: Axes, role: Role, names: list[str], times: Floats, values: Floats) -> None:
    """A line per instance of a role or, of many, their mean between the least and the most."""
    if not names:
        return
    colours = colormaps[_COLOURS[role]]
    if len(names) <= _MAX_LINES:
        for number, (name, line) in enumerate(zip(names, values, strict=True)):
            axis.plot(times, line, color=colours(0.9 - 0.5 * number / len(names)), linewidth=1, label=name)
        return
    axis.fill_between(times, values.min(axis=0), values.max(axis=0), color=colours(0.4), alpha=0.4)
    axis.plot(times, values.mean(axis=0), color=colours(0.85), label=f"{len(names)} {role}: mean, range")
