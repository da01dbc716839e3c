"""Writes what the clients found: JSON with every round, and medians with deviations out of bounds marked."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

BOUND = 0.05
REFERENCE, CONTROL = "distserve bench", "distserve bench, again"
JUDGED = ("throughput", "latency_mean", "latency_p50", "ttft_mean", "ttft_p50", "itl_mean", "itl_p50")
"""What has to agree; 99th percentiles of one run's requests are shown and not judged."""
_ROWS = (REFERENCE, CONTROL, "vllm bench serve", "closed_loop.py")
SHOWN = (*JUDGED, "latency_p99", "ttft_p99", "itl_p99")
_HEADINGS = {
    "throughput": "tokens out/s",
    "latency_mean": "latency, mean",
    "latency_p50": "P50",
    "latency_p99": "P99",
    "ttft_mean": "TTFT, mean",
    "ttft_p50": "P50",
    "ttft_p99": "P99",
    "itl_mean": "ITL, mean",
    "itl_p50": "P50",
    "itl_p99": "P99",
}
_ORDER = sorted(SHOWN, key=list(_HEADINGS).index)
Rounds = list[dict[str, float]]


def medians(rounds: Rounds) -> dict[str, float]:
    """The median over rounds of every figure."""
    return {name: median(figures[name] for figures in rounds) for name in rounds[0]}


def deviations(clients: dict[str, Rounds], client: str) -> dict[str, float]:
    """How far ``client`` is from the reference in what both measure, relative: the median over the rounds.

    In a round they ask the same, shortly one after the other; from round to round the machine's speed changes.
    """
    pairs = list(zip(clients[client], clients[REFERENCE], strict=True))
    return {name: median(theirs[name] / ours[name] - 1 for theirs, ours in pairs) for name in pairs[0][0]}


def misses(clients: dict[str, Rounds], client: str) -> list[str]:
    """What of a client is out of bounds."""
    return [name for name, error in deviations(clients, client).items() if name in JUDGED and abs(error) > BOUND]


def write_report(directory: Path, result: dict[str, Any]) -> int:
    """Write ``result.json`` and ``report.md``; returns how many figures are out of bounds."""
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "report.md").write_text("\n".join(_markdown(result)) + "\n")
    return _tally(result["loads"], _is_outside)[1]


def _is_outside(client: str) -> bool:
    return client not in {REFERENCE, CONTROL}


def _tally(loads: dict[str, dict[str, Rounds]], counts: Callable[[str], bool]) -> tuple[int, int]:
    """Figures judged, and those of them out of bounds, of the clients that count."""
    some = [(clients, client) for clients in loads.values() for client in clients if counts(client)]
    num_judged = sum(name in JUDGED for clients, client in some for name in clients[client][0])
    return num_judged, sum(len(misses(clients, client)) for clients, client in some)


def _markdown(result: dict[str, Any]) -> list[str]:
    loads = result["loads"]
    num_judged, num_missed = _tally(loads, _is_outside)
    num_repeated, num_other = _tally(loads, lambda client: client == CONTROL)
    agreeing = f"All {num_judged}" if not num_missed else f"{num_judged - num_missed} of {num_judged}"
    rows = [
        _row(load, clients, client, misses(clients, client))
        for load, clients in loads.items()
        for client in sorted(clients, key=_ROWS.index)
    ]
    return [
        "# What other clients find",
        "",
        f"{agreeing} figures agree with `distserve bench` within {BOUND:.0%}; what does not is in **bold**.",
        f"With itself, asking again, it agrees in {num_repeated - num_other} of {num_repeated}.",
        "",
        (
            f"- {result['date']}, {result['cpu']}, {result['num_cpus']} cores, commit {result['commit']}, load average "
            f"at the start {result['load_average_at_start']}"
        ),
        (
            f"- `{result['command']}`, {result['duration'] / 60:.0f} minutes; other processes "
            f"kept at most {result['other_load']:.2f} cores busy during a measurement"
        ),
        f"- vLLM's environment: {', '.join(f'{name} {v}' for name, v in sorted(result['vllm'].items()))}",
        (
            f"- medians of {min(len(parts) for clients in result['loads'].values() for parts in clients.values())} "
            "parts or more, milliseconds; in brackets the median of their deviations; percentiles 99 are not judged"
        ),
        "",
        f"| load | client | {' | '.join(_HEADINGS[name] for name in _ORDER)} |",
        f"|---|---|{'---:|' * len(_ORDER)}",
        *rows,
    ]


def _row(load: str, clients: dict[str, Rounds], client: str, missed: list[str]) -> str:
    found, errors = medians(clients[client]), deviations(clients, client)
    cells = []
    for name in _ORDER:
        if name not in found:
            cells.append("")
            continue
        text = f"{found[name]:.1f}" if name == "throughput" else f"{1e3 * found[name]:.1f}"
        if client != REFERENCE:
            text += f" ({errors[name]:+.1%})"
        cells.append(f"**{text}**" if name in missed else text)
    return f"| {load} | {client} | {' | '.join(cells)} |"
