"""The measured curves with the simulator's beside them, dashed: attainment over rate, and latencies."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.goodput.measured.contenders import Contender
from benchmarks.goodput.measured.results import Results, Run
from benchmarks.goodput.measured.runs import OBJECTIVES, TARGET, Requests
from distserve.bench.files import write_atomically

_COLOURS = {
    "disaggregated": "tab:blue",
    "mixed-x1": "tab:green",
    "mixed-x2": "tab:olive",
    "hybrid": "tab:purple",
    "hybrid-tight": "tab:pink",
    "vllm": "tab:red",
    "vllm-disaggregated": "tab:orange",
}
_DOTS_PER_INCH = 110


def write_plots(directory: Path, results: Results) -> None:
    """Write ``attainment.png`` and ``latency.png``."""
    for name, figure in (("attainment.png", _attainment(results)), ("latency.png", _latency(results))):
        path = directory / name
        write_atomically(path, partial(figure.savefig, dpi=_DOTS_PER_INCH))


def _attainment(results: Results) -> Figure:
    figure = Figure(figsize=(15, 3.8 * len(results.measured_workloads())), layout="constrained")
    workloads = results.measured_workloads()
    axes = figure.subplots(len(workloads), len(OBJECTIVES), sharey=True, squeeze=False)
    for row, workload in zip(axes, workloads, strict=True):
        for index, (axis, (name, slo)) in enumerate(zip(row, OBJECTIVES.items(), strict=True)):
            for contender in results.measured_contenders():
                best = results.best(workload, contender, index)
                if best is None:
                    continue
                measured = results.curve(1, workload, contender.name, best.budget)
                predicted = results.predicted_curve(workload, contender.name, best.budget)
                _line(axis, contender, {rate: shares[index] for rate, shares in measured.items()})
                _line(axis, contender, {rate: shares[index] for rate, shares in predicted.items()}, simulated=True)
            axis.axhline(TARGET, color="black", linestyle=":", linewidth=1)
            axis.set(ylim=(0, 1.02), title=f"{workload}: {name}, TTFT {slo.ttft:g} s, TPOT {1e3 * slo.tpot:g} ms")
            _finish(axis, "requests/s")
        row[0].set_ylabel("share within both limits")
    figure.suptitle("Attainment over rate in the first round, with the token budget that is best there")
    _legend(figure, results)
    return figure


def _latency(results: Results) -> Figure:
    figure = Figure(figsize=(19, 3.8 * len(results.measured_workloads())), layout="constrained")
    kinds: dict[str, Callable[[Run], float | None]] = {
        "P90 TTFT, s": lambda run: _figure(run, "ttft_p90"),
        "P90 TPOT, ms": lambda run: _milli(_figure(run, "tpot_p90")),
        "P99 ITL, ms": lambda run: _milli(run["itl"]["p99"]),
        "latency per output token, ms": lambda run: _milli(_figure(run, "token_latency")),
    }
    simulated = {"P90 TTFT, s": ("ttft_p90", 1.0), "P90 TPOT, ms": ("tpot_p90", 1e3)}
    simulated["latency per output token, ms"] = ("token_latency", 1e3)
    tops = {"P90 TTFT, s": 2.5, "P90 TPOT, ms": 120, "P99 ITL, ms": 400, "latency per output token, ms": 120}
    workloads = results.measured_workloads()
    axes = figure.subplots(len(workloads), len(kinds), squeeze=False)
    for row, workload in zip(axes, workloads, strict=True):
        for axis, (kind, value) in zip(row, kinds.items(), strict=True):
            over_throughput = kind.startswith("latency")
            for contender in results.measured_contenders():
                budget = contender.budgets[0]
                runs = [run for run in results.runs() if _is(run, workload, contender, budget)]
                line, predicted = {}, {}
                for run in runs:
                    at = run["request_throughput"] if over_throughput else run["rate"]
                    if (found := value(run)) is not None:
                        line[at] = found
                    figures = results.prediction(run)
                    if figures is not None and kind in simulated:
                        name, factor = simulated[kind]
                        if figures[name] is not None:
                            predicted[at] = factor * figures[name]
                _line(axis, contender, line)
                _line(axis, contender, predicted, simulated=True)
            axis.set(ylim=(0, tops[kind]), title=workload, ylabel=kind)
            _finish(axis, "requests/s answered" if over_throughput else "requests/s")
    figure.suptitle("Latencies over load, with each one's first token budget")
    _legend(figure, results)
    return figure


def _is(run: Run, workload: str, contender: Contender, budget: int) -> bool:
    return (run["round"], run["workload"], run["contender"], run["budget"]) == (1, workload, contender.name, budget)


def _line(axis: Axes, contender: Contender, points: dict[float, float], *, simulated: bool = False) -> None:
    if points:
        at = sorted(points)
        axis.plot(at, [points[x] for x in at], **_style(contender, simulated))


def _style(contender: Contender, simulated: bool) -> dict[str, Any]:
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5}
    if simulated:
        style = {"linestyle": "--", "linewidth": 1, "alpha": 0.8}
    return {"color": _COLOURS[contender.name], **style}


def _finish(axis: Axes, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)


def _legend(figure: Figure, results: Results) -> None:
    """One for all panels, below them."""
    contenders = results.measured_contenders()
    lines = [Line2D([], [], label=contender.title, **_style(contender, False)) for contender in contenders]
    simulated = Line2D([], [], color="grey", linestyle="--", linewidth=1, label="simulated")
    figure.legend(handles=[*lines, simulated], loc="outside lower center", ncols=4)


def _figure(run: Run, name: str) -> float | None:
    value: float | None = Requests.from_json(run["requests"]).figures(run["warmup"])[name]
    return value


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
