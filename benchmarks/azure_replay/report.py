"""Writes a replay's result: JSON with every figure, a table for people, and one compressed line per request."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

COLUMNS = ("index", "scheduled", "status", "prompt_len", "output_len", "num_output_tokens", "ttft", "tpot", "latency")
"""What is kept of a request: seconds and tokens."""


def write_requests(path: Path, requests: list[dict[str, Any]]) -> None:
    """Write ``requests`` as gzipped CSV; the same requests give the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(requests)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def write_report(directory: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` and ``report.md`` into ``directory``."""
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "report.md").write_text(_markdown(result))


def _markdown(result: dict[str, Any]) -> str:
    replay, trace, goodput, slo = (result[name] for name in ("replay", "trace", "goodput", "slo"))
    summary = replay["summary"]
    verdict = "; ".join(result["problems"]) or (
        f"All {summary['num_ok']:,} requests succeeded with the output length they asked for; "
        "afterwards nothing ran or waited and every KV block of every instance was free."
    )
    if goodput["high"]:
        bracket = f"{goodput['low']:.1f} requests/s, missed at {goodput['high']:.1f}"
        share = f"{replay['share_of_goodput']:.0%} of the rate that misses it"
    else:
        bracket = f"at least {goodput['low']:.1f} requests/s"
        share = f"{replay['share_of_goodput']:.0%} of that"
    head = f"""# Azure conversation trace on 2 prefill + 1 decode instances

{verdict}

- {result["date"]}, {result["cpu"]}, {result["num_cpus"]} cores, commit {result["commit"]}
- `{result["command"]}`, which serves with `{" ".join(result["serve"])}`
- {trace["num_requests"]:,} requests: the first {trace["seconds"]:g} s of {trace["name"]}, replayed \
{replay["speedup"]:.2f} times as fast; lengths times {replay["length_factor"]:.4f}, so that the longest fits \
{result["context"]} tokens
- goodput with TTFT {slo["slo_ttft"]:g} s and TPOT {slo["slo_tpot"]:g} s for {slo["attainment"]:.0%}, same lengths, \
Poisson arrivals: {bracket}
- replayed at {replay["rate"]:.1f} requests/s: {share}
"""
    rows = [
        "| | mean | p50 | p90 | p99 | max |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name}, ms | "
            + " | ".join(_ms(summary[key][part]) for part in ("mean", "p50", "p90", "p99", "max"))
            + " |"
            for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("latency", "latency"))
        ),
        "",
        "| | |",
        "|---|---:|",
        f"| attainment | {summary['attainment']['both']:.1%} |",
        f"| duration, s | {summary['duration']:.0f} |",
        f"| requests/s answered | {summary['request_throughput']:.1f} |",
        f"| prompt tokens a request, mean | {summary['mean_prompt_tokens']:.0f} |",
        f"| prompt tokens/s | {summary['prompt_token_throughput']:.0f} |",
        f"| output tokens a request, mean | {summary['mean_output_tokens']:.0f} |",
        f"| output tokens/s | {summary['output_token_throughput']:.0f} |",
        f"| in flight, mean and most | {summary['mean_in_flight']:.1f}, {summary['max_in_flight']} |",
        *(f"| {name.removesuffix('_seconds')}, mean ms | {_ms(value)} |" for name, value in replay["phases"].items()),
        "",
        "![latency](latency.png)",
        "",
        "![requests over time](requests_over_time.png)",
        "",
        f"`result.json` has every figure, `requests.csv.gz` one line per request ({', '.join(COLUMNS)}).",
    ]
    return head + "\n" + "\n".join(rows) + "\n"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"
