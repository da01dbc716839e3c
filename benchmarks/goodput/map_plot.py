"""The map as one picture: a panel for each model, objective and link, prompt length across and output length up.

A cell's colour says how far the best mode with a pool of prefill instances is ahead of, or behind, the best mixed one;
its letter is the mode that wins.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from benchmarks.goodput.fleet import MODES, TOLERANCE, Mode
from benchmarks.goodput.map_grid import NUM_INSTANCES, WHOLE
from benchmarks.goodput.map_rows import Row, Verdict, in_cell, judge

TIE = 1 + TOLERANCE
"""Ratios below this are within the brackets of the goodputs."""
_MOST = 1.0
"""Of log2: twice as good is as dark as it gets."""
_TICKS = (0.5, 0.7, 1.0, 1.4, 2.0)
_COLOURS = "RdBu"
_NOWHERE = "#d4d4d4"
_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class _Axes:
    """What the panels are of, in order, and what is along their axes."""

    objectives: list[str]
    bandwidths: list[float]
    prompts: list[int]
    outputs: list[int]


def measured_everywhere(rows: Sequence[Row]) -> list[Mode]:
    """The modes that have a row in every cell: others would win where nobody else was asked."""
    bandwidths = {row.bandwidth for row in rows if row.bandwidth}
    num_points = len({row.key for row in rows})
    counts = Counter(row.mode for row in rows)
    return [m for m in MODES if counts[m.name] == num_points * (len(bandwidths) if m.moves_kv else 1)]


def draw(rows: Sequence[Row]) -> Figure:
    """The whole map, of the modes that were measured everywhere."""
    modes = measured_everywhere(rows)
    rows = [row for row in rows if row.mode in {mode.name for mode in modes}]
    models = list(dict.fromkeys(row.model for row in rows))
    axes = _Axes(
        list(dict.fromkeys(row.objective for row in rows)),
        sorted({row.bandwidth for row in rows if row.bandwidth}, reverse=True),
        sorted({row.prompt for row in rows}),
        sorted({row.output for row in rows}),
    )
    height = (1.75 * len(axes.objectives) + 0.8) * len(models) + 1.0
    figure = Figure(figsize=(3.5 * len(axes.bandwidths) + 0.8, height), layout="constrained")
    heights = [*[1.0] * len(models), len(models) / (height - 1)]
    parts = figure.subfigures(len(models) + 1, 1, squeeze=False, height_ratios=heights).ravel()
    for model, part in zip(models, parts, strict=False):
        _draw_model(part, [row for row in rows if row.model == model], axes)
    _draw_key(parts[-1], modes)
    return figure


def _draw_model(part: SubFigure, rows: Sequence[Row], axes: _Axes) -> None:
    part.suptitle(f"{rows[0].model}, {_instances(rows[0].model)}", fontsize=12, fontweight="bold")
    panels = part.subplots(len(axes.objectives), len(axes.bandwidths), sharex=True, sharey=True, squeeze=False)
    for line, objective in zip(panels, axes.objectives, strict=True):
        of_objective = [row for row in rows if row.objective == objective]
        for panel, bandwidth in zip(line, axes.bandwidths, strict=True):
            _draw_panel(panel, of_objective, bandwidth, axes)
        line[0].set_ylabel(f"{_limits(of_objective)}\ntokens out", fontsize=8.5)
    for panel, bandwidth in zip(panels[0], axes.bandwidths, strict=True):
        panel.set_title(_link(bandwidth), fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("tokens in", fontsize=8.5)


def _draw_panel(panel: Axes, rows: Sequence[Row], bandwidth: float, axes: _Axes) -> None:
    prompts, outputs = axes.prompts, axes.outputs
    shades = np.full((len(outputs), len(prompts)), np.nan)
    panel.set_facecolor(_NOWHERE)
    for y, output in enumerate(outputs):
        for x, prompt in enumerate(prompts):
            of_cell = in_cell(rows, (rows[0].model, rows[0].objective, prompt, output), bandwidth)
            if not of_cell:
                continue
            verdict = judge(of_cell)
            if verdict.winner:
                shades[y, x] = np.clip(np.log2(max(verdict.ratio, 1e-9)), -_MOST, _MOST)
            colour = "white" if abs(shades[y, x]) > 0.7 * _MOST else "black"
            panel.text(x, y, _words(verdict), ha="center", va="center", fontsize=8.5, color=colour)
    panel.imshow(shades, origin="lower", cmap=_COLOURS, norm=Normalize(-_MOST, _MOST), aspect="auto")
    panel.set_xticks(range(len(prompts)), [f"{prompt:,}" for prompt in prompts], fontsize=8)
    panel.set_yticks(range(len(outputs)), [f"{output:,}" for output in outputs], fontsize=8)
    panel.set_xticks(np.arange(1, len(prompts)) - 0.5, minor=True)
    panel.set_yticks(np.arange(1, len(outputs)) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=1.2)
    panel.tick_params(which="both", length=0)


def _draw_key(part: SubFigure, modes: Sequence[Mode]) -> None:
    axis = part.subplots()
    bar = part.colorbar(ScalarMappable(Normalize(-_MOST, _MOST), _COLOURS), cax=axis, orientation="horizontal")
    bar.set_ticks(np.log2(_TICKS).tolist(), labels=["2x worse", "1.4x", "equal", "1.4x", "2x better"])
    letters = ", ".join(f"{mode.letter} {mode.name}" for mode in modes)
    bar.set_label(
        f"goodput per GPU with a pool of prefill instances, beside the best mixed instances. Winner: {letters};\n"
        f"by how much over the best of the other colour (=: less than {TIE - 1:.0%}); grey: nobody meets the objective",
        fontsize=9,
    )


def _words(verdict: Verdict) -> str:
    if not verdict.winner:
        return "none"
    times = max(verdict.ratio, 1 / verdict.ratio) if verdict.ratio > 0 else float("inf")
    if times < TIE:
        return f"{verdict.winner} ="
    if not np.isfinite(times):
        return f"{verdict.winner} only"
    if verdict.is_bound:
        return f"{verdict.winner} >{math.floor(times * 10 + 0.05) / 10:.1f}"
    return f"{verdict.winner} {times:.2f}"


def _instances(model: str) -> str:
    (tp,) = (served.tp for served in WHOLE.models if served.model.name == model)
    return f"{NUM_INSTANCES} instances of {tp} H100{'s' * (tp > 1)}"


def _limits(rows: Sequence[Row]) -> str:
    shortest, longest = (extreme(row.ttft for row in rows) for extreme in (min, max))
    return f"{rows[0].objective}\nTPOT {1000 * rows[0].tpot:.0f} ms\nTTFT {shortest:.1f} to {longest:.1f} s"


def _link(bandwidth: float) -> str:
    per_node = 8 * _GPUS_PER_NODE * bandwidth / 1e9
    return f"link: {bandwidth / 1e9:.3g} GB/s per GPU ({per_node:,.0f} Gbit/s per node)"
