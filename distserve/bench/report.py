"""The result as JSON and as tables.

The JSON document (``schema`` "distserve-bench/1"); times in seconds, lengths in tokens, absent figures null::

    created      ISO 8601, UTC
    target       url, model
    options      the command's options, by name
    slo          ttft, tpot, attainment; or null
    notes        what a reader must know to read the figures right
    interrupted  the user ended it; error: why the runs ended early or count for nothing ("" otherwise)
    runs[]       label, rate (null: a trace's own times, or closed loop), length_factor, stopped ("" or why early),
                 summary   metrics.Summary, field by field
                 requests[]  index, scheduled, sent, end (since the run's start), status, http_status, error,
                             prompt_len, output_len (asked for), num_prompt_tokens, num_output_tokens (counted),
                             count_source, ttft, tpot, latency, timeline (the server's, or null),
                             event_times, event_tokens (with --token-times)
    goodput      low, high, closed, reason, probes[] (rate, passed, verdict, attainment, decided_early, complete,
                 stability; run: the index in runs); or null

An infinite limit of the SLO is null too.
"""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distserve.bench.files import write_atomically
from distserve.bench.goodput import Goodput, Probe
from distserve.bench.metrics import SLO, Distribution, Summary, summarise
from distserve.bench.records import RequestRecord, Status
from distserve.bench.session import Measured, Outcome

SCHEMA = "distserve-bench/1"
_REQUEST_FIELDS = (
    *("index", "scheduled", "sent", "end", "status", "http_status", "error", "prompt_len", "output_len"),
    *("num_prompt_tokens", "num_output_tokens", "count_source", "ttft", "tpot", "latency", "timeline"),
)
_LAG_WARNING_SECONDS = 0.01


def to_document(
    outcome: Outcome,
    options: dict[str, Any],
    url: str,
    slo: SLO | None,
    warmup: float,
    *,
    token_times: bool = False,
) -> dict[str, Any]:
    """The JSON document of ``outcome``, as plain dicts and lists."""
    document = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {"url": url, "model": outcome.model},
        "options": options,
        "slo": asdict(slo) if slo else None,
        "notes": outcome.notes,
        "interrupted": outcome.interrupted,
        "error": outcome.error,
        "runs": [
            {
                "label": measured.label,
                "rate": measured.rate,
                "length_factor": measured.workload.length_factor,
                "stopped": measured.run.stopped,
                "summary": asdict(summarise(measured.run.records, slo, warmup)),
                "requests": [_request(record, token_times) for record in measured.run.records],
            }
            for measured in outcome.runs
        ],
        "goodput": _goodput(outcome.goodput, len(outcome.runs)) if outcome.goodput else None,
    }
    clean: dict[str, Any] = _clean(document)
    return clean


def _request(record: RequestRecord, token_times: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(record, name) for name in _REQUEST_FIELDS}
    if token_times:
        fields |= {"event_times": record.event_times.tolist(), "event_tokens": record.event_tokens.tolist()}
    return fields


def _goodput(goodput: Goodput, num_runs: int) -> dict[str, Any]:
    # A last one that was not begun has no run.
    probes = [
        asdict(probe) | {"run": index if index < num_runs else None} for index, probe in enumerate(goodput.probes)
    ]
    return asdict(goodput) | {"probes": probes}


def _clean(value: Any) -> Any:
    """``value`` for JSON: microseconds are enough, and NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` to ``path``, whole or not at all."""
    text = json.dumps(document) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def print_report(console: Console, outcome: Outcome, slo: SLO | None, warmup: float) -> None:
    """Tables for people: each run's figures, a sweep's or search's rates side by side, and what to be wary of."""
    summaries = [summarise(measured.run.records, slo, warmup) for measured in outcome.runs]
    pairs = list(zip(outcome.runs, summaries, strict=True))
    if len(pairs) == 1 and outcome.goodput is None:
        console.print(_run_table(*pairs[0], slo))
    elif pairs:
        console.print(_rates_table(pairs, outcome.goodput))
    if outcome.goodput is not None:
        _print_goodput(console, outcome.goodput, slo)
    for note in [*outcome.notes, *_warnings(summaries)]:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for summary in summaries:
        for message, num in summary.errors.items():
            console.print(f"[red]{num} x[/red] {escape(message)}")
    if outcome.interrupted:
        console.print("[yellow]interrupted: the figures are of what was measured until then[/yellow]")
    if outcome.error:
        console.print(f"[red]error:[/red] {escape(outcome.error)}")


def _run_table(measured: Measured, summary: Summary, slo: SLO | None) -> Table:
    title = f"{measured.label}: {summary.num_offered} requests in {summary.duration:.1f} s"
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, dist in (
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("latency", summary.latency),
    ):
        table.add_row(f"{name}, ms", *_milliseconds(dist))
    table.add_section()
    counts = (
        f"{summary.num_ok} ok, {summary.num_shed} shed, {summary.num_failed} failed, {summary.num_timeout} timed out"
    )
    if summary.num_cancelled:
        counts += f", {summary.num_cancelled} cut off"
    rows = [
        ("requests", counts),
        ("offered, answered", f"{summary.offered_rate:.2f}/s, {summary.request_throughput:.2f}/s"),
        ("tokens in", f"{summary.prompt_token_throughput:.0f}/s (mean {summary.mean_prompt_tokens:.0f} a request)"),
        ("tokens out", f"{summary.output_token_throughput:.0f}/s (mean {summary.mean_output_tokens:.0f} a request)"),
        ("in flight", f"mean {summary.mean_in_flight:.1f}, most {summary.max_in_flight}"),
    ]
    if slo is not None and summary.attainment is not None:
        met = summary.attainment
        rows += [
            ("SLO", f"{slo} of the requests offered"),
            ("attainment", f"{_share(met.both, slo)} (95% interval: {met.low:.1%} to {met.high:.1%})"),
            (
                "of them",
                f"TTFT met {met.ttft:.1%}, TPOT met {met.tpot:.1%}; {summary.slo_throughput:.2f}/s met both",
            ),
        ]
    rows.append(("FastGen effective", _fastgen(summary)))
    grid = Table.grid(padding=(0, 2))
    for name, text in rows:
        grid.add_row(name, text)
    outer = Table.grid()
    outer.add_row(table)
    outer.add_row(grid)
    return outer


def _share(value: float, slo: SLO) -> str:
    colour = "green" if value >= slo.attainment else "red"
    return f"[{colour}]{value:.1%}[/{colour}]"


def _fastgen(summary: Summary) -> str:
    figures = summary.fastgen_effective_throughput
    return f"{', '.join(f'{value:.2f}' for value in figures.values())} requests/s at {', '.join(figures)} tokens/s"


def _milliseconds(dist: Distribution) -> list[str]:
    values = (dist.mean, dist.p50, dist.p90, dist.p95, dist.p99, dist.max)
    return ["-" if value is None else f"{value * 1000:.1f}" for value in values]


def _rates_table(pairs: list[tuple[Measured, Summary]], goodput: Goodput | None) -> Table:
    table = Table(title="probes, in order" if goodput else "rates", box=SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    headings = ("n", "TTFT p50", "p90", "TPOT p50", "p90", "attained", "verdict" if goodput else "out tok/s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (measured, summary) in enumerate(pairs):
        met = summary.attainment
        probe = goodput.probes[index] if goodput and index < len(goodput.probes) else None
        share = "-" if met is None else f"{met.both:.1%}"
        if probe is not None and probe.decided_early:
            share = f"<= {probe.attainment:.1%}"
        ttft, tpot = _milliseconds(summary.ttft), _milliseconds(summary.tpot)
        label = f"{measured.rate:.4g}/s" if measured.rate is not None else measured.label
        row = [label, str(summary.num_offered), ttft[1], ttft[2], tpot[1], tpot[2]]
        row += [share, _verdict(probe) if probe is not None else f"{summary.output_token_throughput:.0f}"]
        table.add_row(*row)
    table.caption = "latencies in ms"
    return table


def _verdict(probe: Probe) -> str:
    if probe.passed:
        return "[green]met[/green]"
    if not probe.complete:
        return "cut off"
    if probe.stability is not None and not probe.stability.stable:
        return "[red]unstable[/red]"
    return "[red]missed early[/red]" if probe.decided_early else "[red]missed[/red]"


def _print_goodput(console: Console, goodput: Goodput, slo: SLO | None) -> None:
    assert slo is not None
    upper = "not found" if goodput.high is None else f"{goodput.high:.3g}/s"
    console.print(f"[bold]goodput {goodput.low:.3g} requests/s[/bold] ({slo}); lowest rate that failed: {upper}")
    console.print(f"{'' if goodput.closed else 'interval not closed: '}{escape(goodput.reason)}")


def _warnings(summaries: list[Summary]) -> list[str]:
    warnings = []
    lag = max((s.send_lag.p99 or 0.0 for s in summaries), default=0.0)
    if lag > _LAG_WARNING_SECONDS:
        warnings.append(f"the client itself was up to {lag * 1000:.0f} ms (p99) late in sending; latencies include it")
    if any("events" in s.count_sources for s in summaries):
        warnings.append("the server reports neither usage nor token ids: output tokens are counted as events")
    short = [
        (s.mean_output_tokens / s.mean_output_tokens_asked, s.mean_output_tokens_asked, s.mean_output_tokens)
        for s in summaries
        if s.num_ok and s.mean_output_tokens < 0.99 * s.mean_output_tokens_asked
    ]
    if short:
        _, asked, got = min(short)
        warnings.append(f"outputs are shorter than asked for: mean {got:.1f} of {asked:.1f} tokens")
    return warnings


def exit_code(outcome: Outcome) -> int:
    """0: measured; 1: ``error`` says why not, or no request succeeded; 130: interrupted."""
    if outcome.interrupted:
        return 130
    all_records = [record for measured in outcome.runs for record in measured.run.records]
    failed = bool(outcome.error) or not any(record.status is Status.OK for record in all_records)
    return 1 if failed else 0
