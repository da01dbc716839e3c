"""Writes the comparison's result: JSON with every figure, and a table with the ratios and what they are to reach."""

import json
from pathlib import Path
from statistics import median
from typing import Any

Figures = dict[str, Any]
_PREFILL_REACH, _DECODE_REACH, _GOODPUT_REACH = 0.8, 1.25, 4.0
_MEMORY_REACH, _READY_REACH = 3e9, 25.0


def write_report(directory: Path, result: Figures) -> None:
    """Write ``result.json`` and ``report.md`` into ``directory``."""
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "report.md").write_text("\n".join(_markdown(result)) + "\n")


def _markdown(result: Figures) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["vllm"].items()))
    lines = [
        "# distserve and vLLM on two CPU cores",
        "",
        (
            f"- {result['date']}, {result['cpu']}, {result['num_cpus']} cores, commit {result['commit']}, "
            f"load average at the start {result['load_average_at_start']}"
        ),
        f"- `{result['command']}`, {result['duration'] / 60:.0f} minutes",
        (
            f"- vLLM: {versions}; ours: torch {result['packages']['torch']}; random weights of the shape that "
            "`benchmarks/make_model.py` makes, bfloat16"
        ),
    ]
    for name, part in (("kernels", _kernels), ("goodput", _goodput), ("whole", _whole)):
        if name in result:
            lines += ["", *part(result[name])]
    return [*lines, "", *_start(result)]


def _kernels(figures: Figures) -> list[str]:
    rows = [
        "## One prefill and one decode instance, a core each, against vLLM on one core",
        "",
        "Medians of the rounds; the spread of the rounds is in `result.json`. A ratio is ours over vLLM's.",
        "",
        "| | ours | vLLM, one core | ratio | to reach | |",
        "|---|---:|---:|---:|---|---|",
    ]
    ours, vllm = _medians(figures["ttft_1024"])
    rows.append(_row("prefill of 1024 tokens, tokens/s", 1024 / ours, 1024 / vllm, ".0f", least=_PREFILL_REACH))
    ours, vllm = _medians(figures["prompt_tokens_per_second"])
    rows.append(_row("prefill, saturated, tokens/s", ours, vllm, ".0f", least=_PREFILL_REACH))
    for batch in (1, 8, 32):
        ours, vllm = _medians(figures[f"decode_step_{batch}"])
        rows.append(_row(f"decode step at batch {batch}, ms", 1e3 * ours, 1e3 * vllm, ".1f", most=_DECODE_REACH))
    return rows


def _goodput(figures: Figures) -> list[str]:
    ours, vllm = figures["ours"], figures["vllm"]
    rows = [
        "## Goodput against vLLM's own disaggregated prefill",
        "",
        (
            "90% of requests within TTFT 1 s and TPOT 60 ms; Poisson arrivals, lognormal prompts (mean 300, sigma 0.8, "
            "at most 1500), outputs (mean 60, sigma 0.6, at most 256)."
        ),
        "",
        "| | ours, 1 + 1 | vLLM, 1 + 1 | ratio | to reach | |",
        "|---|---:|---:|---:|---|---|",
        # Where no rate passed, the smallest that failed bounds it from above.
        _row("goodput by search, requests/s", ours["low"], vllm["low"] or vllm["high"], ".2f", least=_GOODPUT_REACH),
        "",
        (
            f"The searches bracketed [{_rate(ours['low'])}, {_rate(ours['high'])}) and "
            f"[{_rate(vllm['low'])}, {_rate(vllm['high'])}) requests/s. Paired runs with other seeds, ours at its "
            "goodput, vLLM at a quarter of that rate:"
        ),
        "",
        "| | requests/s | attainment by round | P90 TTFT, s | P90 TPOT, ms | RSS, GB | PSS, GB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for side, name in (("ours", "ours"), ("vllm", "vLLM disaggregated")):
        runs = [pair[side] for pair in figures["paired"]]
        attained = ", ".join(f"{run['attainment']:.0%}" for run in runs)
        ttft, tpot = (_median(runs, key) for key in ("ttft_p90", "tpot_p90"))
        rss, pss = (max(run[key] for run in runs) / 1e9 for key in ("rss", "pss"))
        rows.append(
            f"| {name} | {runs[0]['rate']:.2f} | {attained} | {_number(ttft, '.2f')} | "
            f"{_number(tpot and 1e3 * tpot, '.1f')} | {rss:.2f} | {pss:.2f} |"
        )
    return rows


def _whole(figures: Figures) -> list[str]:
    rows = [
        "## Both cores against vLLM's best on both cores, for orientation",
        "",
        "| | ours, 1 + 1 | vLLM, both cores | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, key in (
        ("TTFT of 128 tokens, ms", "ttft_128"),
        ("TTFT of 1024 tokens, ms", "ttft_1024"),
    ):
        ours, vllm = _medians(figures[key])
        rows.append(f"| {name} | {1e3 * ours:.1f} | {1e3 * vllm:.1f} | {ours / vllm:.2f} |")
    for clients in (1, 8, 32):
        ours, vllm = (figures[f"closed_loop_{clients}"][side] for side in ("ours", "vllm"))
        a, b = ours["output_tokens_per_second"], vllm["output_tokens_per_second"]
        rows.append(
            f"| closed loop 256 in / 64 out, {clients} clients, output tokens/s | {a:.0f} | {b:.0f} | {a / b:.2f} |"
        )
        rows.append(f"| and its median TPOT, ms | {1e3 * ours['tpot']:.1f} | {1e3 * vllm['tpot']:.1f} | |")
    busy = figures["closed_loop_32"]
    for kind in ("rss", "pss"):
        a, b = (busy[side][kind] / 1e9 for side in ("ours", "vllm"))
        rows.append(f"| {kind.upper()} with 32 clients, GB | {a:.2f} | {b:.2f} | {a / max(b, 1e-9):.2f} |")
    return rows


def _start(result: Figures) -> list[str]:
    rows = [
        "## Memory and start-up",
        "",
        "Every process counts, Ray's too. RSS counts a page once for each process that maps it, PSS once in all.",
        "",
        "| | figure | to reach | |",
        "|---|---:|---|---|",
    ]
    loaded = [pair["ours"] for pair in result.get("goodput", {}).get("paired", [])]
    loaded += [result["whole"][f"closed_loop_{n}"]["ours"] for n in (1, 8, 32)] if "whole" in result else []
    if loaded:
        rss, pss = (max(figures[kind] for figures in loaded) for kind in ("rss", "pss"))
        rows.append(f"| ours, RSS under load, GB | {rss / 1e9:.2f} | < 3 | {_mark(rss < _MEMORY_REACH)} |")
        rows.append(f"| ours, PSS under load, GB | {pss / 1e9:.2f} | | |")
    for name, seconds in result["ready_seconds"].items():
        reach = ("< 25", _mark(median(seconds) < _READY_REACH)) if name == "ours" else ("", "")
        rows.append(f"| {name}, start to ready, s | {median(seconds):.1f} | {reach[0]} | {reach[1]} |")
    rows += [f"| {name}, cores busy while idle | {median(c):.3f} | | |" for name, c in result["idle_cores"].items()]
    return rows


def _row(
    name: str, ours: float, vllm: float, form: str, *, least: float | None = None, most: float | None = None
) -> str:
    ratio = ours / vllm if vllm else float("inf")
    reach = f">= {least:g}" if least is not None else f"<= {most:g}"
    met = ratio >= least if least is not None else most is not None and ratio <= most
    return f"| {name} | {ours:{form}} | {vllm:{form}} | {ratio:.2f} | {reach} | {_mark(met)} |"


def _mark(met: bool) -> str:
    return "met" if met else "**missed**"


def _medians(figures: Figures) -> tuple[float, float]:
    return figures["median"]["ours"], figures["median"]["vllm"]


def _median(runs: list[Figures], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return median(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
