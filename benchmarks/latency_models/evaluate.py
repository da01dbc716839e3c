"""How wrong the analytic latency model is, on measurements that its coefficients were not fitted to.

    python -m benchmarks.latency_models.evaluate            # rewrites results/ beside this file; two minutes

Whole steps are held out by groups (one model, card and tensor-parallel degree under one engine), by models and by
cards, each time with everything fitted anew on the rest; never single rows. Operators are reported apart. Needs the
measurements in ``../shared/data`` and, for the cards of its tables, ``pip install aiconfigurator-core``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency_models.fit import engine_of, kernel_sets
from benchmarks.latency_models.operators import Table, load_tables
from benchmarks.latency_models.steps import Group, load_composed, load_groups
from simulator.latency.efficiency import Efficiency, Engine
from simulator.latency.kernels import Array

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute relative errors of ``count`` rows: ``median`` and 90th percentile ``p90``; ``bias`` the median ratio."""

    count: int
    median: float
    p90: float
    bias: float


def errors(predicted: Array, measured: Array, weights: Array | None = None) -> Errors:
    """Of rows, each with its weight."""
    ratio = predicted / measured
    weights = np.ones_like(ratio) if weights is None else weights
    return Errors(
        len(ratio),
        _quantile(np.abs(ratio - 1), weights, 0.5),
        _quantile(np.abs(ratio - 1), weights, 0.9),
        _quantile(ratio, weights, 0.5),
    )


def _quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, share)])


class HeldOut:
    """Predictions for groups of steps from coefficients fitted without them."""

    def __init__(self, tables: list[Table], groups: list[Group]) -> None:
        self.tables, self.groups = tables, groups
        self._known: dict[tuple[str, ...], Efficiency] = {}

    def kernels(self, keep: Callable[[Table], bool]) -> dict[str, Efficiency]:
        """Kernels' coefficients from the tables to keep."""
        return kernel_sets([table for table in self.tables if keep(table)], self._known)

    def kernels_of_others(self, card: str) -> dict[str, Efficiency]:
        """Kernels' coefficients without any table of the card."""
        return self.kernels(lambda table: table.gpu.kernels != card)

    def without_group(self, held: Group) -> Array | None:
        """Other degrees and models of the card are fitted, and its operators unless the group is the sum of them."""
        kernels = self.kernels(lambda table: not table.name.startswith(held.tables))
        rest = [other for other in self.groups if other.engine == held.engine and other is not held]
        return _predict(held, rest, kernels)

    def without_model(self, held: Group) -> Array | None:
        """No step of the model is fitted; None if its engine was measured on no other."""
        rest = [other for other in self.groups if other.engine == held.engine and other.model != held.model]
        return _predict(held, rest, self.kernels(lambda _: True)) if rest else None

    def without_card(self, held: Group) -> Array | None:
        """Nothing measured on the card is fitted; None if its engine was measured on no other."""
        kernels = self.kernels_of_others(held.gpu.kernels)
        rest = [other for other in self.groups if other.engine == held.engine and other.gpu != held.gpu]
        return _predict(held, rest, kernels) if rest else None


def _predict(held: Group, rest: list[Group], kernels: dict[str, Efficiency]) -> Array:
    return held.predict(kernels[held.gpu.kernels], engine_of(held.engine, rest, kernels))


def phases(group: Group) -> Iterator[tuple[str, Array]]:
    """(name, rows) of its steps with prompts and of those without."""
    has_prompt = np.array([step.num_prefill_tokens > 0 for step in group.steps])
    for name, rows in (("prefill", has_prompt), ("decode", ~has_prompt)):
        if rows.any():
            yield name, rows


def pooled(pairs: list[tuple[Group, Array]]) -> Errors:
    """Over all groups, each weighing the same however many steps it has."""
    weights = np.concatenate([np.full(len(group.steps), 1 / len(group.steps)) for group, _ in pairs])
    measured = np.concatenate([group.seconds for group, _ in pairs])
    return errors(np.concatenate([predicted for _, predicted in pairs]), measured, weights)


WAYS: dict[str, Callable[[HeldOut, Group], Array | None]] = {
    "group": HeldOut.without_group,
    "model": HeldOut.without_model,
    "card": HeldOut.without_card,
}


def evaluate(held_out: HeldOut) -> dict[str, Any]:
    """Every figure of the report."""
    steps = {}
    for way, predict in WAYS.items():
        found = [(group, predicted) for group in held_out.groups if (predicted := predict(held_out, group)) is not None]
        steps[way] = {
            "pooled": asdict(pooled(found)),
            "groups": {
                f"{group.name}, {phase}": asdict(errors(predicted[rows], group.seconds[rows]))
                for group, predicted in found
                for phase, rows in phases(group)
            },
        }
    own = held_out.kernels(lambda _: True)
    composed = {}
    pairs: dict[str, list[tuple[Group, Array]]] = {"own": [], "card out": []}
    for group in load_composed():
        card = group.gpu.kernels
        choices = {"own": own[card], "card out": held_out.kernels_of_others(card)[card]}
        times = {way: group.predict(efficiency, Engine()) for way, efficiency in choices.items()}
        for way, predicted in times.items():
            pairs[way].append((group, predicted))
        composed[f"{group.model.name} on {group.gpu.name} tp{group.tp}"] = {
            phase: {way: asdict(errors(times[way][rows], group.seconds[rows])) for way in times}
            for phase, rows in phases(group)
        }
    operators = {}
    on_links = [(group, predicted) for group, predicted in pairs["card out"] if group.tp == 1 or group.gpu.nvlink]
    pairs["card out, but for shards over PCIe"] = on_links
    totals = {way: asdict(pooled(found)) for way, found in pairs.items() if found}
    for table in held_out.tables:
        card = table.gpu.kernels
        without = held_out.kernels_of_others(card)
        operators[table.name] = {
            "fitted": table.fitted,
            "own": asdict(errors(table.predict(own[card]), table.seconds)),
            "card out": asdict(errors(table.predict(without[card]), table.seconds)),
        }
    return {"steps": steps, "composed": composed, "composed pooled": totals, "operators": operators}


_INTRODUCTION = """\
# How wrong the analytic latency model is

`python -m benchmarks.latency_models.evaluate` writes this page. Errors are absolute and relative to the measurement:
their median and 90th percentile over the rows; *ratio* is the median of predicted over measured.

The measurements are other people's, see `operators.py` and `steps.py` beside this page; coefficients are fitted by
`fit.py`. A *group* is one model, card and tensor-parallel degree under one engine. [README](../README.md) says what is
left out and why, where the errors come from, and what would reduce them.
"""

_WAYS = {
    "group": """\
## Whole steps, group left out

Everything is fitted anew without the group. A layer profile's own kernels are left out with it: the RTX 4090's is then
predicted from other cards alone.
""",
    "model": """\
## Whole steps, model left out

The engine is fitted on its other model (engines measured with one model are missing).
""",
    "card": """\
## Whole steps, card left out

No measurement on the card takes part: its kernels are those of its kin, at the clock that its power allows, the engine
is the one fitted on another card's host, at the speed of its own (engines measured on one card are missing).
""",
}


_COMPOSED = """\
## Whole steps composed of measured kernels

Against `aiconfigurator-core`, which interpolates and adds up kernels measured on each card (no engine, no host):
"""
_COEFFICIENTS = {
    "own": "with the card's own coefficients, fitted to the same kernels but not to steps",
    "card out": "with those of other cards alone",
    "card out, but for shards over PCIe": "the latter, but for tp 4 over PCIe",
}

_OPERATORS = """\
## Operators

Whether a fit sees the table; then errors with the card's own coefficients, and with those of other cards alone. The
coefficients of an all-reduce are those of vLLM's own in a CUDA graph, so NCCL's are underestimated: what an engine
loses by calling NCCL is a parameter of the engine. Over PCIe they are those of one machine each: machines differ.
"""


def render(results: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        _INTRODUCTION,
        "| left out of the fit | steps | median | P90 | of at most 12% and 30% |\n|---|--:|--:|--:|---|",
    ]
    for way in _WAYS:
        total = results["steps"][way]["pooled"]
        verdict = "reached" if total["median"] <= 0.12 and total["p90"] <= 0.3 else "missed"
        lines.append(f"| {way} | {total['count']} | {total['median']:.1%} | {total['p90']:.1%} | {verdict} |")
    lines.append("")
    for way, text in _WAYS.items():
        found = results["steps"][way]
        total = found["pooled"]
        count = total["count"]
        lines += [
            text,
            f"**Groups weighing the same: median {total['median']:.1%}, P90 {total['p90']:.1%}** ({count} steps).\n",
            "| group | steps | median | P90 | ratio |\n|---|--:|--:|--:|--:|",
        ]
        lines += [f"| {name} | {_cells(row)} |" for name, row in found["groups"].items()]
        lines.append("")
    lines.append(_COMPOSED)
    for way, total in results["composed pooled"].items():
        lines.append(f"- {_COEFFICIENTS[way]}: median {total['median']:.1%}, P90 {total['p90']:.1%} of all steps")
    lines += [
        "",
        "| step | rows | median | P90 | ratio | card left out: median | P90 | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, by_phase in results["composed"].items():
        lines += [f"| {name}, {phase} | {_cells(row['own'])} | {_without(row)} |" for phase, row in by_phase.items()]
    lines += [
        "",
        _OPERATORS,
        "| table | fitted | rows | median | P90 | ratio | card left out: median | P90 | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results["operators"].items():
        lines.append(f"| {name} | {'yes' if row['fitted'] else 'no'} | {_cells(row['own'])} | {_without(row)} |")
    return "\n".join(lines) + "\n"


def _without(row: dict[str, dict[str, float]]) -> str:
    return _cells(row["card out"]).split(" | ", 1)[1]


def _cells(row: dict[str, float]) -> str:
    return f"{row['count']} | {row['median']:.1%} | {row['p90']:.1%} | {row['bias']:.2f}"


def main() -> None:
    """Evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output: Path = parser.parse_args().output
    results = evaluate(HeldOut(load_tables(), load_groups()))
    output.mkdir(exist_ok=True)
    (output / "errors.json").write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(render(results), encoding="utf-8")
    print(render(results))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
