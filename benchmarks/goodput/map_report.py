"""The map in figures: how far ways of serving are ahead of others over all lengths, by objective, model and link."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from benchmarks.goodput.fleet import MODES
from benchmarks.goodput.map_plot import TIE, measured_everywhere
from benchmarks.goodput.map_rows import Row, in_cell

_MIXED = tuple(mode.name for mode in MODES if not mode.moves_kv)


def report(rows: Sequence[Row], command: str) -> str:
    """Markdown; ``command`` repeats the map."""
    pooled = [mode.name for mode in measured_everywhere(rows) if mode.moves_kv]
    bandwidths = sorted({row.bandwidth for row in rows if row.bandwidth}, reverse=True)
    panels: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        panels[f"| {row.objective} | {row.model} |"].append(row)
    split, whole = _MIXED
    return "\n".join(
        [
            "# When disaggregation pays: the map in figures",
            "",
            f"    {command}",
            "",
            "Goodput over that of the best mixed way: smallest to largest over the lengths, in brackets the mean and",
            f"in how many cells it is ahead, level (within {TIE - 1:.0%}) and behind. *<*: not measured closely.",
            "",
            f"| objective | model | link, GB/s per GPU | {' | '.join(pooled)} |",
            "|---|---|--:|" + "--:|" * len(pooled),
            *(
                " | ".join(
                    [
                        f"{where} {bandwidth / 1e9:.3g}",
                        *(_summary(_ratios(panel, name, _MIXED, bandwidth)) for name in pooled),
                    ]
                )
                + " |"
                for where, panel in panels.items()
                for bandwidth in bandwidths
            ),
            "",
            f"The same of {whole} over {split}:",
            "",
            "| objective | model | |",
            "|---|---|--:|",
            *(f"{where} {_summary(_ratios(panel, whole, (split,), 0.0))} |" for where, panel in panels.items()),
            "",
        ]
    )


def _ratios(rows: Sequence[Row], name: str, rivals: Sequence[str], bandwidth: float) -> list[tuple[float, bool]]:
    """Of every cell, ``name``'s goodput over its best rival's; with True it is less than that."""
    ratios = []
    for key in dict.fromkeys(row.key for row in rows):
        cell = {row.mode: row for row in in_cell(rows, key, bandwidth)}
        best = max(cell[rival].goodput for rival in rivals)
        if best:
            mine = cell[name]
            ratios.append(((mine.goodput or mine.high) / best, mine.goodput == 0))
    return ratios


def _summary(ratios: Sequence[tuple[float, bool]]) -> str:
    if not ratios:
        return "-"
    (low, is_bound), (high, _) = min(ratios), max(ratios)
    ahead = sum(ratio >= TIE for ratio, _ in ratios)
    behind = sum(ratio <= 1 / TIE for ratio, _ in ratios)
    whole = "" if any(bound for _, bound in ratios) else f"{mean(ratio for ratio, _ in ratios):.2f}; "
    return f"{'<' * is_bound}{low:.2f} to {high:.2f} ({whole}{ahead}, {len(ratios) - ahead - behind}, {behind})"
