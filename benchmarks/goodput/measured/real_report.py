"""Writes what was measured so far: goodputs with the simulator's beside them, tails, and every run as a line of CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.goodput.measured.contenders import CONTENDERS, OURS, Contender
from benchmarks.goodput.measured.ladder import bracket, goodput
from benchmarks.goodput.measured.real_plots import write_plots
from benchmarks.goodput.measured.results import Results, run_name
from benchmarks.goodput.measured.runs import OBJECTIVES, TARGET, WORKLOADS, Requests
from distserve.bench.files import write_atomically

_FIGURES = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90", "token_latency")
_TAIL_RATES = (1.0, 1.41, 1.99, 2.81, 3.97, 5.61, 7.93, 11.21)


def write_report(directory: Path, results: Results) -> None:
    """Write ``report.md``, ``runs.csv`` and the plots into ``directory``."""
    lines = _markdown(directory, results)
    write_atomically(directory / "report.md", lambda place: place.write_text("\n".join(lines) + "\n"))
    write_atomically(directory / "runs.csv", lambda place: place.write_text(_csv(results)))
    if results.measured_workloads():
        write_plots(directory, results)


def _markdown(directory: Path, results: Results) -> list[str]:
    runs = list(results.runs())
    lines = ["# Ways to serve on this machine's cores", ""]
    if not runs:
        return [*lines, "Nothing is measured yet."]
    missing = [contender.title for contender in CONTENDERS.values() if contender not in results.measured_contenders()]
    machine = json.loads((directory / "machine.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["vllm"].items()))
    lines += [
        (
            f"- {len(runs)} runs, {min(run['date'] for run in runs)[:16]} to {max(run['date'] for run in runs)[:16]}, "
            f"commits {', '.join(sorted({run['commit'] for run in runs}))}"
        ),
        f"- {machine['cpu']}, {machine['num_cpus']} cores; vLLM: {versions}",
        f"- other processes kept at most {max(run['other_load'] for run in runs):.2f} cores busy during a run",
        f"- rounds: {results.num_rounds}; not measured: {'; '.join(missing) or 'nothing'}",
        (
            "- objectives: "
            + "; ".join(f"{name}: TTFT {o.ttft:g} s, TPOT {1e3 * o.tpot:g} ms" for name, o in OBJECTIVES.items())
            + f"; {TARGET:.0%} of the requests offered"
        ),
        *(f"- {name}: prompts {mix.prompt_len}, outputs {mix.output_len}" for name, mix in WORKLOADS.items()),
        "",
        "![attainment](attainment.png)",
        "",
        "![latencies](latency.png)",
        "",
        *_goodputs(results),
        *_tails(results),
        *_errors(results),
    ]
    return lines


def _goodputs(results: Results) -> list[str]:
    contenders = results.measured_contenders()
    cells = [(workload, index) for workload in results.measured_workloads() for index in range(len(OBJECTIVES))]
    names = list(OBJECTIVES)
    head = " | ".join(f"{workload}: {names[index]}" for workload, index in cells)
    lines = [
        "## Goodput, requests/s",
        "",
        "The median of the rounds; in brackets what the simulator says of the first round's runs; after @ the tokens",
        "a step that were best, after x the rounds, if several. *>*: the highest rate that was measured was still met;",
        "0: the lowest was not. The ratios are of the best of ours with most rounds.",
        "",
        f"| | {head} |",
        f"|---|{'---:|' * len(cells)}",
    ]
    for contender in contenders:
        texts = [_goodput(results, workload, contender, index) for workload, index in cells]
        lines.append(f"| {contender.title} | {' | '.join(texts)} |")
    ratios = [best_ratio(results, workload, index) for workload, index in cells]
    shown = " | ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    return [*lines, f"| best of ours / vLLM on all cores | {shown} |", ""]


def _goodput(results: Results, workload: str, contender: Contender, index: int) -> str:
    best = results.best(workload, contender, index)
    if best is None:
        return "-"
    text = _rate(best.goodput, is_open=best.is_open)
    curve = results.predicted_curve(workload, contender.name, best.budget)
    if curve:
        is_open = bracket(curve, index, TARGET)[1] is None
        text += f" ({_rate(goodput(curve, index, TARGET), is_open=is_open)})"
    num_rounds = len(best.goodputs)
    return f"{text} @{best.budget}" + (f" x{num_rounds}" if num_rounds > 1 else "")


def _rate(rate: float, *, is_open: bool) -> str:
    return f"{'> ' if is_open else ''}{rate:.2f}" if rate else "0"


def best_ratio(results: Results, workload: str, objective: int) -> float | None:
    """The best of our goodputs over vLLM's in a cell; None unless both were measured, or if neither serves anything.

    Ours is the best of those that were measured in most rounds: one round of a few dozen requests may flatter.
    """
    ours = [results.best(workload, CONTENDERS[name], objective) for name in OURS]
    theirs = results.best(workload, CONTENDERS["vllm"], objective)
    found = [(len(best.goodputs), best.goodput) for best in ours if best is not None]
    return ratio(max(found)[1], theirs.goodput) if found and theirs is not None else None


def ratio(ours: float, theirs: float) -> float | None:
    """``ours / theirs``, infinite over nothing; None for nothing over nothing."""
    if theirs:
        return ours / theirs
    return float("inf") if ours else None


def _tails(results: Results) -> list[str]:
    lines = [
        "## P99 of ITL under load, milliseconds",
        "",
        "Gaps between two tokens of an answer, of the first round, with each contender's first budget.",
        "",
        f"| | | {' | '.join(f'{rate:g}/s' for rate in _TAIL_RATES)} |",
        f"|---|---|{'---:|' * len(_TAIL_RATES)}",
    ]
    for workload in results.measured_workloads():
        for contender in results.measured_contenders():
            found = {
                run["rate"]: run["itl"]["p99"]
                for run in results.runs()
                if (run["workload"], run["contender"], run["round"]) == (workload, contender.name, 1)
                and run["budget"] == contender.budgets[0]
            }
            cells = [f"{1e3 * found[rate]:.0f}" if found.get(rate) is not None else "" for rate in _TAIL_RATES]
            lines.append(f"| {workload} | {contender.title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _errors(results: Results) -> list[str]:
    """Where both were still within twice the balanced limits: beyond, a little more load is a lot of latency."""
    lines = [
        "## The simulator beside the measurements",
        "",
        "Over all runs of a contender that were attained at all (balanced objective at least 50%): the mean absolute",
        "error of the three attainments, and the median relative errors of latencies (sign: predicted less measured).",
        "",
        "| | runs | attainment, points | TTFT P50 | TTFT P90 | TPOT P50 | TPOT P90 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    balanced = list(OBJECTIVES).index("balanced")
    for contender in results.measured_contenders():
        shares, latencies, num = [], [], 0
        for run in results.runs():
            predicted = results.prediction(run)
            if run["contender"] != contender.name or predicted is None:
                continue
            measured = Requests.from_json(run["requests"]).figures(run["warmup"])
            if measured["attainments"][balanced] < 0.5:
                continue
            num += 1
            shares += [a - b for a, b in zip(predicted["attainments"], measured["attainments"], strict=True)]
            latencies.append([_error(predicted[name], measured[name]) for name in _FIGURES[:4]])
        if num:
            middle = np.nanmedian(latencies, axis=0)
            cells = " | ".join(f"{error:+.1%}" for error in middle)
            lines.append(f"| {contender.title} | {num} | {100 * np.mean(np.abs(shares)):.1f} | {cells} |")
    return [*lines, ""]


def _error(predicted: float | None, measured: float | None) -> float:
    return predicted / measured - 1 if predicted is not None and measured else float("nan")


def _csv(results: Results) -> str:
    text = io.StringIO()
    keys = ("workload", "contender", "budget", "round", "rate", "seed", "other_load", "commit", "date")
    rates = ("request_throughput", "output_throughput")
    objectives = [f"attainment {name}" for name in OBJECTIVES]
    names = [*objectives, *_FIGURES]
    columns = [*keys, "run", *rates, "itl_p50", "itl_p99", *names, *(f"predicted {name}" for name in names)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in results.runs():
        measured = Requests.from_json(run["requests"]).figures(run["warmup"])
        predicted = results.prediction(run)
        row: dict[str, Any] = {key: run[key] for key in (*keys, *rates)}
        row |= {"run": run_name(run), "itl_p50": run["itl"]["p50"], "itl_p99": run["itl"]["p99"]}
        row |= _row(measured, "") | (_row(predicted, "predicted ") if predicted is not None else {})
        writer.writerow({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
    return text.getvalue()


def _row(figures: dict[str, Any], prefix: str) -> dict[str, float | None]:
    shares = {f"{prefix}attainment {name}": v for name, v in zip(OBJECTIVES, figures["attainments"], strict=True)}
    return shares | {f"{prefix}{name}": figures[name] for name in _FIGURES}
