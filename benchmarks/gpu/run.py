"""Our GPU kernels and the engine on them against what bounds them, in one run on one card.

    python -m benchmarks.gpu.run --output benchmarks/gpu/results/h200

prints one table and writes it as ``.md``, with card, driver, library versions and command, and as ``.json``. Each
operation is checked first, then timed alternating with its ceiling: the ratio is the median over pairs. Then a Llama of
8B parameters with random weights: decode steps, a prompt, and a load beside transformers' continuous batching. With
matplotlib there is a plot of the decode step, ``.png``; without it, :mod:`benchmarks.gpu.plot` draws it elsewhere.

``--dry-run`` runs the same on the CPU in Triton's interpreter, on tiny shapes: a rehearsal, whose times mean nothing.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.card import describe_run
from benchmarks.gpu.plot import plot
from benchmarks.gpu.rows import Row, table
from benchmarks.gpu.timing import Stopwatch


def measure(device: torch.device, *, tiny: bool, repetitions: int) -> list[Row]:
    """The kernels' rows, each reported on stderr as it is done."""
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


def report(rows: Sequence[Row], facts: dict[str, object]) -> str:
    """The table under what it must be read with."""
    said = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"# GPU kernels and engine against their ceilings\n\n{said}\n\n{table(rows)}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Our GPU kernels and engine against what bounds them.")
    rehearsal = "rehearse on the CPU: tiny shapes, interpreted, times void"
    parser.add_argument("--dry-run", "--dry", dest="dry", action="store_true", help=rehearsal)
    parser.add_argument("--only", choices=("kernels", "engine"), help="measure just these")
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
        parser.error("no CUDA device; --dry-run rehearses without one")
    torch.manual_seed(0)
    facts = {**describe_run("benchmarks.gpu.run", device), "dry": options.dry}
    repetitions = 1 if options.dry else options.repetitions
    rows: list[Row] = []
    points: list[dict[str, float]] = []
    if options.only != "engine":
        rows += measure(device, tiny=options.dry, repetitions=repetitions)
    if options.only != "kernels":
        from benchmarks.gpu.engine import measure_engine

        engine_rows, curve = measure_engine(device, tiny=options.dry, repetitions=repetitions)
        rows += engine_rows
        points = [asdict(point) for point in curve]
    print(table(rows))
    if options.dry:
        print("A rehearsal in the interpreter: the figures mean nothing.")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(report(rows, facts))
        written = {"run": facts, "rows": [asdict(row) for row in rows], "decode": points}
        options.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
        if points and importlib.util.find_spec("matplotlib") is not None:
            plot(written, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
