"""DeepSpeed-FastGen's claims beside simulated points: the figures, the table and the plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SPLIT, WHOLE = "SplitFuse", "whole prompts"
OF_2023 = ", speed of 2023"
PAIRS = {
    "both with today's kernels": (SPLIT, WHOLE),
    "the baseline alone at vLLM's speed of 2023": (SPLIT, WHOLE + OF_2023),
    "both at vLLM's speed of 2023": (SPLIT + OF_2023, WHOLE + OF_2023),
}
"""What is compared: SplitFuse and whole prompts."""
_SEVERAL = 4
STYLES = {
    SPLIT: ("tab:blue", "-o"),
    WHOLE: ("tab:orange", "-s"),
    SPLIT + OF_2023: ("tab:blue", "--o"),
    WHOLE + OF_2023: ("tab:orange", "--s"),
}


@dataclass(frozen=True)
class Point:
    """One system at one number of clients: requests/s, seconds, and by service level (tokens/s) what met it.

    ``effective`` in requests/s, ``met`` as a share; ``gap_*`` are percentiles of the gaps between tokens.
    """

    system: str
    prompt: int
    output: int
    clients: int
    throughput: float
    latency: float
    ttft_p50: float
    effective: dict[str, float]
    met: dict[str, float]
    gap_p50: float
    gap_p90: float
    gap_p95: float


@dataclass(frozen=True)
class Claims:
    """The paper's figures out of ``points``; None where the points do not reach so far."""

    points: Sequence[Point]

    def of(self, system: str, prompt: int, output: int) -> list[Point]:
        """A system's points, fewest clients first."""
        mine = [p for p in self.points if (p.system, p.prompt, p.output) == (system, prompt, output)]
        return sorted(mine, key=lambda point: point.clients)

    def throughput_at(self, system: str, latency: float) -> float | None:
        """Requests/s at a mean latency (seconds), 1200 in and 128 out, linear between points."""
        mine = self.of(system, 1200, 128)
        return _at(latency, [p.latency for p in mine], [p.throughput for p in mine])

    def latency_at(self, system: str, throughput: float) -> float | None:
        """Mean latency (seconds) at so many requests/s, 1200 in and 128 out, linear between points."""
        mine = self.of(system, 1200, 128)
        return _at(throughput, [p.throughput for p in mine], [p.latency for p in mine])

    def largest_gain(self, pair: tuple[str, str]) -> tuple[float, float] | None:
        """The largest ratio of throughputs at equal latency, and that latency (1200 in, 128 out).

        Latencies that both have with four clients or more: with one alone there is nothing to schedule.
        """
        mine = [[p.latency for p in self.of(system, 1200, 128) if p.clients >= _SEVERAL] for system in pair]
        low, high = max(min(latencies) for latencies in mine), min(max(latencies) for latencies in mine)
        found = []
        for latency in np.linspace(low, high, 200).tolist() if low < high else ():
            split, whole = (self.throughput_at(system, latency) for system in pair)
            if split and whole:
                found.append((split / whole, latency))
        return max(found, default=None)

    def best_effective(self, system: str) -> Point:
        """The point of the highest effective throughput at 4 tokens/s, 2600 in and 60 out."""
        return max(self.of(system, 2600, 60), key=lambda point: point.effective["4"])

    def at_16(self, system: str) -> Point | None:
        """16 clients, 2600 in and 128 out."""
        return next((p for p in self.of(system, 2600, 128) if p.clients == 16), None)

    def table(self) -> list[dict[str, Any]]:
        """Every claim for every pair."""
        rows = []
        for name, pair in PAIRS.items():
            split, whole = (self.throughput_at(system, 9.0) for system in pair)
            fast, slow = (self.latency_at(system, 1.2) for system in pair)
            best, other = (self.best_effective(system) for system in pair)
            tails = [self.at_16(system) for system in pair]
            gain = self.largest_gain(pair)
            rows.append(
                {
                    "pair": name,
                    "throughput_at_9_s": [split, whole, _ratio(split, whole)],
                    "largest_throughput_ratio": gain,
                    "latency_at_1.2_per_s": [fast, slow, _ratio(slow, fast)],
                    "effective_at_4_tokens_per_s": [
                        best.effective["4"],
                        other.effective["4"],
                        _ratio(best.effective["4"], other.effective["4"]),
                    ],
                    "clients_at_peak": [best.clients, other.clients],
                    "missed_at_peak": [1 - best.met["4"], 1 - other.met["4"]],
                    "gap_p50_16_clients": [tail.gap_p50 if tail else None for tail in tails],
                    "gap_p95_16_clients": [
                        *(tail.gap_p95 if tail else None for tail in tails),
                        _ratio(*(tail.gap_p95 if tail else None for tail in reversed(tails))),
                    ],
                }
            )
        return rows


def _at(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Of the curve in order of clients, where it first passes ``x``."""
    for (x0, x1), (y0, y1) in zip(pairwise(xs), pairwise(ys), strict=True):
        if min(x0, x1) <= x <= max(x0, x1) and x0 != x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first and second else None


def report(claims: Claims, facts: dict[str, Any], num_requests: int) -> str:
    """The table as Markdown."""
    rows = claims.table()
    heads = ["", "paper", *(row["pair"] for row in rows)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [
        _line("requests/s at a latency of 9 s, 1200/128", "1.36 / 0.67: 2.0x", rows, "throughput_at_9_s"),
        _line("latency at 1.2 requests/s, 1200/128, s", "7 / 14: 2.0x", rows, "latency_at_1.2_per_s"),
        "| largest throughput ratio at any latency, 1200/128 | up to 2x | "
        + " | ".join(_gain(row["largest_throughput_ratio"]) for row in rows)
        + " |",
        _line("effective requests/s at 4 tokens/s, 2600/60", "1.42 / 0.63: 2.3x", rows, "effective_at_4_tokens_per_s"),
        "| missed at that peak | 1% / 28% | "
        + " | ".join(f"{row['missed_at_peak'][0]:.0%} / {row['missed_at_peak'][1]:.0%}" for row in rows)
        + " |",
        _line("P95 gap between tokens, 16 clients, 2600/128, s", "1 / 3.7", rows, "gap_p95_16_clients"),
        "| P50 of the same, s | alike | "
        + " | ".join(" / ".join(_number(value) for value in row["gap_p50_16_clients"]) for row in rows)
        + " |",
    ]
    table = "\n".join(lines)
    return f"""# DeepSpeed-FastGen's tables, simulated

{facts["date"][:10]}; `{facts["command"]}`. Llama-2-70B on four A100-80G (TP4), {num_requests} requests a point,
[all points](fastgen.csv). SplitFuse / whole prompts: ratio. [What it means](../README.md#fastgens-tables).

{table}

![Latency over throughput](fastgen_latency.png)

![Effective throughput](fastgen_effective.png)

![Gaps between tokens](fastgen_gaps.png)
"""


def _line(name: str, paper: str, rows: Sequence[dict[str, Any]], key: str) -> str:
    cells = [f"{_number(a)} / {_number(b)}: {_times(c)}" for a, b, c in (row[key] for row in rows)]
    return f"| {name} | {paper} | {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "out of range" if value is None else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"**{value:.2f}x**"


def _gain(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f}x, at {value[1]:.1f} s"


def draw(points: Sequence[Point], directory: Path) -> None:
    """The paper's figures 2, 4 and 5."""
    claims = Claims(points)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, (prompt, output) in zip(figure.subplots(1, 2), ((1200, 128), (2600, 60)), strict=True):
        for name, (colour, style) in STYLES.items():
            mine = claims.of(name, prompt, output)
            axis.plot([p.throughput for p in mine], [p.latency for p in mine], style, color=colour, label=name, ms=4)
        axis.set(title=f"{prompt} tokens in, {output} out", xlabel="requests/s", ylabel="mean latency, s")
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        if (prompt, output) == (1200, 128):
            axis.plot([1.36, 1.2], [9, 7], "*", color="tab:blue", ms=13, label="the paper's FastGen")
            axis.plot([0.67, 1.2], [9, 14], "*", color="tab:orange", ms=13, label="the paper's vLLM")
            axis.legend(fontsize=8)
    figure.suptitle("Llama-2-70B on four A100, 1 to 32 clients")
    figure.savefig(directory / "fastgen_latency.png", dpi=110)

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    for axis, rate in zip(figure.subplots(1, 3, sharey=True), ("2", "4", "6"), strict=True):
        for name, (colour, style) in STYLES.items():
            mine = claims.of(name, 2600, 60)
            axis.plot([p.clients for p in mine], [p.effective[rate] for p in mine], style, color=colour, label=name)
        axis.set(title=f"at least {rate} tokens/s", xlabel="clients", ylim=(0, None))
        axis.grid(alpha=0.3)
        if rate == "4":
            axis.axhline(1.42, color="tab:blue", ls=":", label="the paper's FastGen at its best")
            axis.axhline(0.63, color="tab:orange", ls=":", label="the paper's vLLM at its best")
            handles, labels = axis.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        if rate == "2":
            axis.set_ylabel("effective requests/s")
    figure.suptitle("Effective throughput, 2600 tokens in, 60 out: first token within prompt/512 s, EMA of the gaps")
    figure.savefig(directory / "fastgen_effective.png", dpi=110)

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    _bars(figure.subplots(), claims)
    figure.savefig(directory / "fastgen_gaps.png", dpi=110)


def _bars(axis: Axes, claims: Claims) -> None:
    names = [name for name in STYLES if claims.at_16(name)]
    for place, name in enumerate(names):
        point = claims.at_16(name)
        assert point is not None
        values = [point.gap_p50, point.gap_p90, point.gap_p95]
        colour, style = STYLES[name]
        hatch = "//" if style.startswith("--") else ""
        offsets = np.arange(3) + 0.2 * (place - 1.5)
        bars = axis.bar(offsets, values, 0.18, color=colour, alpha=0.8, hatch=hatch, label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(3), ["P50", "P90", "P95"])
    axis.set(ylabel="seconds between tokens", title="2600 tokens in, 128 out, 16 clients")
    axis.legend(fontsize=8)
