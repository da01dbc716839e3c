"""Writes what fidelity was measured: JSON with every figure, and the table with its misses marked."""

import json
from pathlib import Path
from typing import Any

ATTAINMENT_BOUND = 0.05
LATENCY_BOUND = 0.10


def errors(run: dict[str, Any], prediction: str = "predicted") -> dict[str, float]:
    """Predicted less measured: attainment in points of one, latencies relative to the measured."""
    measured, predicted = run["measured"], run[prediction]
    return {
        "attainment": predicted["attainment"] - measured["attainment"],
        "ttft": predicted["ttft"] / measured["ttft"] - 1,
        "tpot": predicted["tpot"] / measured["tpot"] - 1,
    }


def misses(run: dict[str, Any], prediction: str = "predicted") -> list[str]:
    """Which figures of a run are out of bounds."""
    bounds = {"attainment": ATTAINMENT_BOUND, "ttft": LATENCY_BOUND, "tpot": LATENCY_BOUND}
    return [name for name, error in errors(run, prediction).items() if abs(error) > bounds[name]]


def write_report(directory: Path, result: dict[str, Any]) -> int:
    """Write ``result.json`` and ``README.md`` into ``directory``; returns how many figures are out of bounds."""
    result["num_figures"] = 3 * len(result["runs"])
    for name, prediction in (("num_missed", "predicted"), ("num_missed_as_profiled", "predicted_as_profiled")):
        result[name] = sum(len(misses(run, prediction)) for run in result["runs"])
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "README.md").write_text(_markdown(result))
    return int(result["num_missed"])


def _markdown(result: dict[str, Any]) -> str:
    num_figures, num_missed = result["num_figures"], result["num_missed"]
    verdict = (
        f"All {num_figures} figures are within bounds."
        if not num_missed
        else f"{num_figures - num_missed} of {num_figures} figures are within bounds; the others are in **bold**."
    )
    dates = sorted(run["date"] for run in result["runs"])
    commits = ", ".join(sorted({run["commit"] for run in result["runs"]}))
    num_again = sum(run["attempts"] > 1 for run in result["runs"])
    slos = {(run["mix"], run["slo"]["ttft"], run["slo"]["tpot"]) for run in result["runs"]}
    head = f"""# Simulator against our own cluster on {result["num_cpus"]} CPU cores

{verdict} Bounds: attainment within {ATTAINMENT_BOUND * 100:.0f} points, median TTFT and median TPOT within \
{LATENCY_BOUND:.0%}.

- {dates[0]} to {dates[-1]}, {result["cpu"]}, commit {commits}
- `{result["command"]}`; predictions anew from what is kept here: `python -m benchmarks.fidelity_cpu.run --again`
- `profile-*.json`: taken by `distserve profile` before each deployment was started, from closed-loop load only
- SLOs: {"; ".join(f"{mix}: TTFT {ttft:g} s, TPOT {tpot:g} s" for mix, ttft, tpot in sorted(slos))}; 90% is the target
- rates are 0.6, 1 and 1.2 times the goodput that the simulator predicted before anything was measured
- one line per request, KV transfer times included: `*.csv.gz` here, columns as in \
[docs/timeline-format.md](../../../docs/timeline-format.md)
- *time of steps*: prompts' and decodes' steps over the profile's, as short closed loops before and after the run show \
them, the mean of both, at which the run is predicted; predicted from the profile as it is, \
{num_figures - result["num_missed_as_profiled"]} of {num_figures} figures are within bounds
- a run during which that changed by more than 6% was taken again, up to twice: {num_again} of {len(result["runs"])} \
were
- *other load*: cores that processes other than the cluster and its client kept busy meanwhile

Measured / predicted (error):

| deployment | mix | rate, 1/s | requests | attainment, % | median TTFT, ms | median TPOT, ms | time of steps \
| other load |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""
    return head + "\n".join(_row(run) for run in result["runs"]) + "\n"


def _row(run: dict[str, Any]) -> str:
    error, missed = errors(run), misses(run)
    measured, predicted = run["measured"], run["predicted"]

    def cell(name: str, factor: float, digits: int) -> str:
        shown = f"{error[name] * 100:+.1f}" if name == "attainment" else f"{error[name]:+.1%}"
        text = f"{measured[name] * factor:.{digits}f} / {predicted[name] * factor:.{digits}f} ({shown})"
        return f"**{text}**" if name in missed else text

    return (
        f"| {run['deployment']} | {run['mix']} | {run['level']}: {run['rate']:.2f} | {run['num_requests']} "
        f"| {cell('attainment', 100, 1)} | {cell('ttft', 1e3, 1)} | {cell('tpot', 1e3, 2)} "
        f"| {_mean(run, 'prompts'):.2f}, {_mean(run, 'decodes'):.2f} | {run['other_load']:.2f} |"
    )


def _mean(run: dict[str, Any], kind: str) -> float:
    before, after = run["speeds"]
    return float((before[kind] * after[kind]) ** 0.5)
