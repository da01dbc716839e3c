"""The map in figures: how far ways of serving are ahead of others over all lengths, by objective, model and link."""

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.goodput.fleet import MODES
from benchmarks.goodput.map_plot import TIE, measured_everywhere
from benchmarks.goodput.map_rows import Row, in_cell

_MIXED = tuple(mode.name for mode in MODES if not mode.moves_kv)


def report(rows: Sequence[Row], command: str) -> str:
    """Markdown; ``command`` repeats the map."""
    names = [mode.name for mode in measured_everywhere(rows)]
    pooled = [name for name in names if name not in _MIXED]
    lines = [
        "# When disaggregation pays: the map in figures",
        "",
        f"    {command}",
        "",
        "Goodput over that of the best mixed way: smallest to largest over the lengths, in brackets the mean and in",
        f"how many cells it is ahead, level (within {TIE - 1:.0%}) and behind. *<*: not measured closely.",
        "",
        "| objective | model | link, GB/s per GPU | " + " | ".join(pooled) + " |",
        "|---|---|--:|" + "--:|" * len(pooled),
    ]
    for objective, model, bandwidth in _panels(rows):
        of_panel = [row for row in rows if (row.objective, row.model) == (objective, model)]
        cells = [_summary(_ratios(of_panel, name, _MIXED, bandwidth)) for name in pooled]
        lines.append(f"| {objective} | {model} | {bandwidth / 1e9:.3g} | " + " | ".join(cells) + " |")
    first, second = _MIXED
    if {first, second} <= set(names):
        lines += ["", f"The same of {second} over {first}:", "", "| objective | model | |", "|---|---|--:|"]
        for objective, model, _ in dict.fromkeys((o, m, 0.0) for o, m, _ in _panels(rows)):
            of_panel = [row for row in rows if (row.objective, row.model) == (objective, model)]
            lines.append(f"| {objective} | {model} | {_summary(_ratios(of_panel, second, (first,), 0.0))} |")
    return "\n".join(lines) + "\n"


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    bandwidths = sorted({row.bandwidth for row in rows if row.bandwidth}, reverse=True)
    for objective in dict.fromkeys(row.objective for row in rows):
        for model in dict.fromkeys(row.model for row in rows):
            for bandwidth in bandwidths:
                yield objective, model, bandwidth


def _ratios(rows: Sequence[Row], name: str, rivals: Sequence[str], bandwidth: float) -> list[tuple[float, bool]]:
    """Of every cell, ``name``'s goodput over its best rival's; with True it is less than that."""
    ratios = []
    for key in dict.fromkeys(row.key for row in rows):
        cell = {row.mode: row for row in in_cell(rows, key, bandwidth)}
        best = max(cell[rival].goodput for rival in rivals if rival in cell)
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
