"""Our GPU kernels against what bounds them, in one run on one card.

    python -m benchmarks.gpu.run --output benchmarks/gpu/results/h200

prints one table and writes it as ``.md``, with card, driver, library versions and command, and as ``.json``. Each
operation is checked first, then timed alternating with its ceiling: the ratio is the median over pairs. About a minute.

``--dry`` runs the same on the CPU in Triton's interpreter, on tiny shapes: a rehearsal, whose times mean nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.card import describe_run
from benchmarks.gpu.timing import Stopwatch


@dataclass(frozen=True)
class Row:
    """One line of the table. Rates are bytes or floating point operations per second."""

    what: str
    achieved: float
    ceiling: float
    unit: str
    against: str
    ratio: float
    wanted: float | None


def measure(device: torch.device, *, tiny: bool, repetitions: int) -> list[Row]:
    """All rows, each reported on stderr as it is done."""
    # Imported here: the interpreter has to be chosen before triton is imported.
    from benchmarks.gpu.cases import TINY, Sizes, all_cases

    watch = Stopwatch(device, repetitions)
    rows = []
    for case in all_cases(TINY if tiny else Sizes(), device):
        case.check()
        seconds, ceiling_seconds, pace = watch.compare(case.ours, case.ceiling)
        # Equal amounts of work on both sides or not: the ratio is of rates.
        ratio = pace * case.ours_amount / case.ceiling_amount
        achieved, ceiling = case.ours_amount / seconds, case.ceiling_amount / ceiling_seconds
        rows.append(Row(case.what, achieved, ceiling, case.unit, case.against, ratio, case.wanted))
        print(f"{case.what}: {ratio:.2f} of {case.against}", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: rates in GB/s and TFLOP/s."""
    lines = [
        "| what | achieved | ceiling | | of | ratio | wanted |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for row in rows:
        scale, unit = (1e9, "GB/s") if row.unit == "B/s" else (1e12, "TFLOP/s")
        wanted = "" if row.wanted is None else f"{row.wanted:.2f}" + ("" if row.ratio >= row.wanted else " **missed**")
        lines.append(
            f"| {row.what} | {row.achieved / scale:,.1f} | {row.ceiling / scale:,.1f} | {unit} "
            f"| {row.against} | {row.ratio:.2f} | {wanted} |"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], facts: dict[str, object]) -> str:
    """The table under what it must be read with."""
    said = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"# GPU kernels against their ceilings\n\n{said}\n\n{table(rows)}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Our GPU kernels against what bounds them.")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU: tiny shapes, interpreted, times void")
    parser.add_argument("--output", type=Path, help="where to write OUTPUT.md and OUTPUT.json")
    parser.add_argument("--repetitions", type=int, default=30, help="pairs timed per row (default 30)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if options.dry:
        from distserve_kernels.gpu.interpreter import interpret

        interpret()
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        parser.error("no CUDA device; --dry rehearses without one")
    torch.manual_seed(0)
    facts = {**describe_run("benchmarks.gpu.run", device), "dry": options.dry}
    rows = measure(device, tiny=options.dry, repetitions=1 if options.dry else options.repetitions)
    print(table(rows))
    if options.dry:
        print("A rehearsal in the interpreter: the figures mean nothing.")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(report(rows, facts))
        written = {"run": facts, "rows": [asdict(row) for row in rows]}
        options.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
