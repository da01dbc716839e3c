"""The hybrid's benchmark on paper: rows for compositions, cells and seeds in a CSV file, a table and a plot of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.goodput.hybrid_loads import NAMES, find_load
from distserve.bench.files import write_atomically

KINDS = ("disaggregated", "mixed", "hybrid")
COLOURS = {"disaggregated": "#4c78a8", "mixed": "#54a24b", "hybrid": "#e45756"}

Cell = tuple[int, str, str]
"""Number of instances, load, objective."""


@dataclass(frozen=True, slots=True)
class Row:
    """One composition in one cell, with the requests of one ``seed``.

    ``goodput`` in requests/s; 0 if it is only known to be no better than another of its kind. ``local`` is the share of
    the prompts that were prefilled on mixed instances, at the largest rate that held.
    """

    instances: int
    workload: str
    objective: str
    seed: int
    kind: str
    composition: str
    goodput: float
    local: float
    num_simulated: int

    @property
    def cell(self) -> Cell:
        """Where it was measured."""
        return self.instances, self.workload, self.objective


def order(rows: Sequence[Row]) -> list[Cell]:
    """The cells that ``rows`` are of, as tables have them."""
    known = {row.cell for row in rows}
    counts = sorted({count for count, _, _ in known})
    all_cells = [(count, name, o) for count in counts for name in NAMES for o in find_load(name).objectives]
    return [cell for cell in all_cells if cell in known]


def chosen(rows: Sequence[Row], cell: Cell) -> dict[str, str]:
    """The best composition of each kind in a cell, by the first seed, which alone had all of them."""
    best: dict[str, Row] = {}
    for row in (row for row in rows if row.cell == cell and row.seed == 0):
        if row.kind not in best or row.goodput > best[row.kind].goodput:
            best[row.kind] = row
    return {kind: row.composition for kind, row in best.items()}


def whole_cells(rows: Sequence[Row]) -> dict[Cell, dict[str, list[Row]]]:
    """For each cell the rows of every kind's chosen composition, by seed; without cells that lack a kind."""
    found: dict[Cell, dict[str, list[Row]]] = {}
    for cell in order(rows):
        compositions = chosen(rows, cell)
        if len(compositions) < len(KINDS):
            continue
        here = [row for row in rows if row.cell == cell and row.composition == compositions[row.kind]]
        found[cell] = {
            kind: sorted((row for row in here if row.kind == kind), key=lambda row: row.seed) for kind in KINDS
        }
    return found


def gains(kinds: dict[str, list[Row]]) -> list[float]:
    """The hybrid's goodput over that of the better pure mode, less one, for every seed that has all of them."""
    by_seed = [{row.seed: row.goodput for row in kinds[kind]} for kind in KINDS]
    apart, mixed, hybrid = by_seed
    seeds = sorted(apart.keys() & mixed.keys() & hybrid.keys())
    return [hybrid[seed] / max(apart[seed], mixed[seed]) - 1 for seed in seeds]


def report(rows: Sequence[Row], tolerance: float) -> str:
    """Markdown: what each kind reaches in each cell. ``tolerance``: how far apart rates may stay."""
    lines = [
        "# Hybrid deployments in simulation",
        "",
        f"Goodput in requests/s (90% of requests within TTFT and TPOT), rates {tolerance:.0%} apart. An H100 for each",
        "instance of Llama-3.1-8B, with the study's lengths and objectives; an A100 for each of OPT-13B, with those of",
        "DistServe's three applications. Of every kind the best composition, by the requests of the first seed: P",
        "prefill, D decode, M mixed instances, and the token budget of the mixed ones. Other seeds have other arrivals",
        "and lengths and those compositions alone. Goodputs and *local*, the share of prompts computed where they were",
        "decoded, are means over the seeds; the last column is the hybrid against the better of the pure modes with",
        "each seed: the mean, the worst and the best.",
        "",
        "| GPUs | lengths | objective | disaggregated | mixed | hybrid | local | against the better | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def entry(found: Sequence[Row]) -> str:
        mean = fmean(row.goodput for row in found)
        return f"{mean:.3g} ({found[0].composition})" if mean else "none"

    for (count, name, objective), kinds in whole_cells(rows).items():
        slo, gained = find_load(name).objectives[objective], gains(kinds)
        values = [
            f"{count}",
            name,
            f"{objective}: {slo.ttft * 1e3:g} ms, {slo.tpot * 1e3:g} ms",
            *(entry(kinds[kind]) for kind in KINDS),
            f"{fmean(row.local for row in kinds['hybrid']):.0%}",
            f"{fmean(gained):+.1%} ({min(gained):+.1%} to {max(gained):+.1%})",
            f"{len(gained)}",
        ]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each kind in each cell, as a share of the better pure mode; the hybrid's from worst to best seed."""
    found = whole_cells(rows)
    counts = sorted({count for count, _, _ in found})
    figure, panels = plt.subplots(len(counts), 1, figsize=(12, 3.6 * len(counts)), squeeze=False, layout="constrained")
    for panel, count in zip(panels[:, 0], counts, strict=True):
        here = [(cell, kinds) for cell, kinds in found.items() if cell[0] == count]
        for index, kind in enumerate(KINDS):
            places = np.arange(len(here)) + 0.27 * (index - 1)
            heights = np.array([_share(kinds, kind) for _, kinds in here])
            panel.bar(places, heights, 0.25, label=kind, color=COLOURS[kind])
            if kind == "hybrid":
                spans = [(1 + min(gains(kinds)), 1 + max(gains(kinds))) for _, kinds in here]
                apart = np.abs(np.array(spans).T - heights)
                panel.errorbar(places, heights, apart, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(here)), [f"{name}\n{objective}" for (_, name, objective), _ in here], fontsize=7)
        panel.set_ylabel("goodput / better pure mode")
        panel.set_title(f"{count} GPUs")
    panels[0, 0].legend(ncols=3, fontsize=8, loc="lower left")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def _share(kinds: dict[str, list[Row]], kind: str) -> float:
    """Mean over seeds of a kind's goodput over the better pure mode's."""
    better = [max(apart.goodput, mixed.goodput) for apart, mixed in zip(kinds[KINDS[0]], kinds[KINDS[1]], strict=True)]
    return fmean(row.goodput / most for row, most in zip(kinds[kind], better, strict=False))
