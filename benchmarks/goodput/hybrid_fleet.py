"""The hybrid on a fleet of eight instances: cells of the map of when_it_pays, looked at closely.

    python -m benchmarks.goodput.hybrid_fleet            # 40 minutes of one core after `make fast`

The map brackets goodputs to 8%, too wide to say whether the hybrid is a few per cent behind the best pure mode. Here it
is 1.5%, in runs up to twice as long, with several seeds: other arrivals and other lengths. The cells are a line of the
map through two objectives, and those on the fastest link where a map had the hybrid more than 2% behind. The first
seed chooses every mode's split or token budget, as the map does; the others are measured with those. What was measured
is kept.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.fleet import MODES, Knob, Mode, Pace
from benchmarks.goodput.hybrid import RESULTS, local_share
from benchmarks.goodput.map_grid import (
    BOTH_LOOSE,
    LLAMA_8B,
    LLAMA_70B,
    TIGHT_TPOT,
    TIGHT_TTFT,
    WHOLE,
    Point,
    fleet_at,
    with_bandwidth,
)
from placement.goodput import Goodput

TOLERANCE, BETTER = 0.015, 1.003
PACE = Pace(residences=16.0, patiences=32.0, least=1600)
BANDWIDTH = WHOLE.bandwidths[0]
LINE = tuple(
    Point(served, objective, prompt, 128)
    for prompt in (15000, 5000, 1500)
    for objective in (TIGHT_TPOT, BOTH_LOOSE)
    for served in WHOLE.models
)
BEHIND = (
    Point(LLAMA_8B, BOTH_LOOSE, 5000, 32),
    Point(LLAMA_8B, TIGHT_TTFT, 15000, 128),
    Point(LLAMA_8B, TIGHT_TPOT, 500, 32),
    Point(LLAMA_70B, TIGHT_TTFT, 5000, 512),
    Point(LLAMA_8B, TIGHT_TTFT, 5000, 512),
    Point(LLAMA_8B, BOTH_LOOSE, 5000, 512),
)
"""On a map, by more than 2% of what is bracketed to 8%."""
HYBRID = MODES[-1]
PURE = (MODES[2], MODES[0], MODES[1])
"""Most often the best one first: the others are measured no closer than it takes to see that they are not."""
_FLOOR = 0.9
"""Of the best pure mode's goodput: with less a split of the hybrid is not looked at any closer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One mode in one cell with one seed; rates in requests/s of the whole fleet.

    ``goodput`` 0: less than another pure mode's, and no more is known. ``num_prefill`` and ``budget`` are its knobs,
    ``local`` the share of the prompts that mixed instances computed at ``low``, the largest rate that held.
    """

    model: str
    objective: str
    prompt: int
    output: int
    seed: int
    mode: str
    num_prefill: int
    budget: int
    setting: str
    goodput: float
    low: float
    high: float
    local: float

    @property
    def knob(self) -> Knob:
        """Where it was measured best with the first seed."""
        return Knob(self.num_prefill, self.budget)

    @property
    def cell(self) -> tuple[str, str, int, int]:
        """Where it was measured."""
        return self.model, self.objective, self.prompt, self.output


def measure(point: Point, seed: int, knobs: dict[str, Knob], likely: dict[str, float]) -> Iterator[Row]:
    """Every mode in one cell, the hybrid last.

    ``knobs`` are where the first seed found the best, empty with that one; ``likely`` is what it found there.
    """
    fleet = replace(fleet_at(point, PACE, seed), tolerance=TOLERANCE, better=BETTER)
    best = 0.0
    for mode in (*PURE, HYBRID):
        there = with_bandwidth(fleet, BANDWIDTH) if mode.moves_kv else fleet
        floor = best if mode is not HYBRID else _FLOOR * best
        if knobs:
            knob = knobs[mode.name]
            goodput = there.goodput(mode, knob, floor, likely.get(mode.name, 0.0))
            setting = there.setting(mode, knob)
        else:
            found = there.best(mode, floor)
            knob, setting, goodput = found.knob, found.setting, found.goodput
        reached = goodput.interval.estimate
        if mode is not HYBRID:
            best = max(best, reached)
        yield Row(
            point.served.model.name,
            point.objective.name,
            point.prompt,
            point.output,
            seed,
            mode.name,
            knob.num_prefill,
            knob.budget,
            setting,
            round(reached, 4),
            round(goodput.low, 4),
            round(goodput.high, 4),
            round(share(mode, goodput), 4),
        )


def share(mode: Mode, goodput: Goodput) -> float:
    """Of the prompts, what mixed instances computed at the largest rate that held."""
    if not mode.moves_kv:
        return 1.0
    return local_share(goodput.nearest(goodput.low).last) if goodput.low > 0 else 0.0


def gains(rows: Sequence[Row]) -> list[float]:
    """The hybrid over the best pure mode, less one, for each seed of one cell's ``rows``."""
    found = []
    for seed in sorted({row.seed for row in rows if row.mode == HYBRID.name}):
        here = {row.mode: row.goodput for row in rows if row.seed == seed}
        found.append(here[HYBRID.name] / max(here[mode.name] for mode in PURE) - 1)
    return found


def report(rows: Sequence[Row]) -> str:
    """Markdown: every cell, goodputs as means over the seeds."""
    lines = [
        "# The hybrid on eight instances",
        "",
        "Cells of the [map](../../../../docs/when-to-disaggregate.md#the-map) on the fastest link: a line through it,",
        "then those where a map had the hybrid more than 2% behind. Runs are longer, goodputs bracketed to",
        f"{TOLERANCE:.1%}. Requests/s of the fleet, means over the seeds; *local* is the share of prompts computed",
        "where they were decoded; then the hybrid over the best of the pure modes with each seed: the mean, the worst",
        "and the best.",
        "",
        "| model | objective | in, out | best pure mode | hybrid | local | against it | worst to best | seeds |",
        "|---|---|--:|---|---|--:|--:|---|--:|",
    ]
    for cell in dict.fromkeys(row.cell for row in rows):
        here = [row for row in rows if row.cell == cell]
        hybrid = [row for row in here if row.mode == HYBRID.name]
        pure = max(
            ([row for row in here if row.mode == mode.name] for mode in PURE),
            key=lambda found: fmean(row.goodput for row in found),
        )
        gained = gains(here)
        model, objective, prompt, output = cell
        values = [
            model,
            objective,
            f"{prompt:,}, {output}",
            f"{fmean(row.goodput for row in pure):.3g} ({pure[0].mode}, {pure[0].setting})",
            f"{fmean(row.goodput for row in hybrid):.3g} ({hybrid[0].setting})",
            f"{fmean(row.local for row in hybrid):.0%}",
            f"{fmean(gained):+.1%}",
            f"{min(gained):+.1%} to {max(gained):+.1%}",
            f"{len(gained)}",
        ]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet; then the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "fleet.csv"
    rows = read_rows(file, Row)
    for point in (*LINE, *BEHIND):
        cell = point.key
        for seed in range(options.seeds):
            here = [row for row in rows if row.cell == cell]
            if any(row.seed == seed for row in here):
                continue
            began = time.perf_counter()
            knobs = {row.mode: row.knob for row in here if row.seed == 0}
            likely = {row.mode: row.goodput for row in here if row.seed == 0}
            rows += measure(point, seed, knobs, likely)
            write_rows(file, Row, rows)
            gained = gains([row for row in rows if row.cell == cell])
            print(f"{cell}, seed {seed}: {gained[-1]:+.1%}, {time.perf_counter() - began:.0f} s", flush=True)
    (options.output / "fleet.md").write_text(report(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
