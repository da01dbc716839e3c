"""The table of what is to be reached: ours, vLLM's, their ratio, and whether it is met; what is missing is said."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.store import Store
from benchmarks.goodput.measured.contenders import CONTENDERS, OURS, Contender
from benchmarks.goodput.measured.real_report import ratio
from benchmarks.goodput.measured.results import Best, Results
from benchmarks.goodput.measured.runs import OBJECTIVES, WORKLOADS
from distserve.bench.files import write_atomically

_MET, _MISSED, _NOT_MEASURED, _NEITHER = "met", "**missed**", "not measured", "neither serves it"
_NOISE = 0.03
"""What one look at a figure is uncertain by."""
_TIGHT_TPOT_REACH, _DISAGGREGATED_REACH, _TAIL_REACH = 1.3, 4.0, 2.0


@dataclass(frozen=True)
class Cell:
    """A figure that is compared: ours over theirs is to be at ``least`` or at ``most`` so much.

    ``least`` is for figures of which more is better. ``factor`` turns it into the unit of its ``title``.
    """

    contest: str
    name: str
    title: str
    least: float | None = None
    most: float | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    ours: str
    theirs: str
    ratio: float | None
    reach: str
    verdict: str


def tune_name(cell: Cell, side: str, budget: int) -> str:
    """Where a first look at a budget is kept."""
    return f"tune/{cell.contest}/{side}-{budget}/{cell.name}"


def round_name(cell: Cell, side: str, number: int) -> str:
    """Where a round's figure is kept."""
    return f"rounds/{cell.contest}/{cell.name}/{number}-{side}"


def tail_name(kind: str, number: int) -> str:
    """Where a percentile of gaps is kept, of the kind ``one`` (client) or (under) ``load``."""
    return f"tails/{kind}/{number}"


def best_budget(store: Store, cell: Cell, side: str, budgets: tuple[int, ...]) -> int:
    """The budget that was best for ``cell`` when all were tried; the first of those as good within noise."""
    if len(budgets) == 1:
        return budgets[0]
    values = {budget: store.read(tune_name(cell, side, budget))["value"] for budget in budgets}
    scores = {budget: value if cell.least is not None else 1 / value for budget, value in values.items()}
    return next(budget for budget in budgets if scores[budget] >= (1 - _NOISE) * max(scores.values()))


def write_report(
    directory: Path, store: Store, contests: dict[str, tuple[list[Cell], Contender, Contender]], real: Results
) -> None:
    """Write ``report.md`` and ``result.json`` into ``directory``."""
    rows = {name: [_compared(store, cell) for cell in cells] for name, (cells, _, _) in contests.items()}
    rows["tails"] = [_tail(store)]
    rows["goodput"] = _goodputs(real)
    every = [row for part in rows.values() for row in part]
    counts = Counter(row.verdict for row in every)
    lines = [
        "# What is to be reached on this machine's cores",
        "",
        f"Of {len(every)}: {', '.join(f'{num} {verdict}' for verdict, num in counts.most_common())}.",
        "",
    ]
    if (directory / "machine.json").exists():
        machine = json.loads((directory / "machine.json").read_text())
        versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["vllm"].items()))
        lines += [
            f"- {machine['date']}, {machine['cpu']}, {machine['num_cpus']} cores, commit {machine['commit']}",
            f"- `{machine['command']}`; vLLM: {versions}",
            f"- other processes kept at most {_other_load(store):.2f} cores busy during a measurement",
            "- medians of the rounds, which took turns; in brackets the tokens a step that were best when tried",
            "",
        ]
    titles = {name: f"{ours.title} against {theirs.title}" for name, (_, ours, theirs) in contests.items()}
    titles |= {"tails": "Gaps between tokens, 1 prefill + 1 decode", "goodput": "Goodput, requests/s"}
    for name, part in rows.items():
        first, second = ("3 requests/s", "one client") if name == "tails" else ("ours", "vLLM")
        lines += [
            f"## {titles[name]}",
            "",
            f"| | {first} | {second} | ratio | to reach | |",
            "|---|---:|---:|---:|---|---|",
        ]
        lines += [_line(row) for row in part]
        lines.append("")
    write_atomically(directory / "report.md", lambda place: place.write_text("\n".join(lines)))
    document: dict[str, Any] = {name: [vars(row) for row in part] for name, part in rows.items()}
    write_atomically(directory / "result.json", lambda place: place.write_text(json.dumps(document, indent=1) + "\n"))


def _other_load(store: Store) -> float:
    names = (name for folder in ("tune", "rounds", "tails") for name in store.names(folder))
    return max((store.read(name)["other_load"] for name in names), default=0.0)


def _line(row: Row) -> str:
    shown = "-" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {row.title} | {row.ours} | {row.theirs} | {shown} | {row.reach} | {row.verdict} |"


def _rounds(store: Store, cell: Cell, side: str) -> list[dict[str, Any]]:
    folder = f"rounds/{cell.contest}/{cell.name}"
    return [store.read(name) for name in store.names(folder) if name.endswith(f"-{side}")]


def _compared(store: Store, cell: Cell) -> Row:
    reach = f">= {cell.least:g}" if cell.least is not None else f"<= {cell.most:g}"
    sides = [_rounds(store, cell, side) for side in ("ours", "vllm")]
    if not all(sides):
        return Row(cell.title, "-", "-", None, reach, _NOT_MEASURED)
    ours, theirs = (median(one["value"] for one in rounds) for rounds in sides)
    texts = [
        f"{cell.factor * value:.4g} ({rounds[0]['budget']})"
        for value, rounds in zip((ours, theirs), sides, strict=True)
    ]
    found = ours / theirs
    met = found >= cell.least if cell.least is not None else cell.most is not None and found <= cell.most
    return Row(cell.title, texts[0], texts[1], found, reach, _verdict(met))


def _tail(store: Store) -> Row:
    title, reach = "P99 of ITL, chat-like, ms", f"<= {_TAIL_REACH:g}"
    found = {kind: [store.read(name)["value"] for name in store.names(f"tails/{kind}")] for kind in ("load", "one")}
    if not all(found.values()):
        return Row(title, "-", "-", None, reach, _NOT_MEASURED)
    load, one = median(found["load"]), median(found["one"])
    return Row(title, f"{1e3 * load:.1f}", f"{1e3 * one:.1f}", load / one, reach, _verdict(load / one <= _TAIL_REACH))


def _goodputs(real: Results) -> list[Row]:
    """The cells of ``benchmarks.goodput.real``, and 1 + 1 against vLLM's own disaggregated prefill."""
    rows = []
    for workload in WORKLOADS:
        for index, name in enumerate(OBJECTIVES):
            least = _TIGHT_TPOT_REACH if name == "tight TPOT" else 1.0
            modes = {CONTENDERS[mode].title: real.best(workload, CONTENDERS[mode], index) for mode in OURS}
            ours = {title: best for title, best in modes.items() if best is not None}
            theirs = real.best(workload, CONTENDERS["vllm"], index)
            best = max(ours, key=lambda title: (len(ours[title].goodputs), ours[title].goodput), default=None)
            mine = ours[best] if best is not None else None
            text = f"{workload}, {name}" + (f" ({best})" if best is not None else "")
            rows.append(_goodput(text, mine, theirs, least))
    balanced = list(OBJECTIVES).index("balanced")
    pair = [real.best("chat", CONTENDERS[name], balanced) for name in ("disaggregated", "vllm-disaggregated")]
    rows.append(_goodput("chat, balanced: disaggregated 1 + 1, both", pair[0], pair[1], _DISAGGREGATED_REACH))
    return rows


def _goodput(title: str, ours: Best | None, theirs: Best | None, least: float) -> Row:
    reach = f">= {least:g}"
    if ours is None or theirs is None:
        return Row(title, _shown(ours), _shown(theirs), None, reach, _NOT_MEASURED)
    found = ratio(ours.goodput, theirs.goodput)
    verdict = _NEITHER if found is None else _verdict(found >= least)
    return Row(title, _shown(ours), _shown(theirs), found, reach, verdict)


def _verdict(met: bool) -> str:
    return _MET if met else _MISSED


def _shown(best: Best | None) -> str:
    if best is None:
        return "-"
    return f"{'> ' if best.is_open else ''}{best.goodput:.2f} ({best.budget})"
