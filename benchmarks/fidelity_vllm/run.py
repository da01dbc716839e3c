"""Replays two measured runs of vLLM on simulated mixed instances and compares every number.

    python -m benchmarks.fidelity_vllm.run ../shared/data/groundtruth/llmservingsim

prints the tables and writes them into ``results`` beside this file. Takes seconds.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.fidelity_vllm.compare import Row, Wave, compare, first_wave
from benchmarks.fidelity_vllm.replay import KERNELS_ALONE, Card, Run, read_run, replay
from simulator.results import Simulation

RUNS = {
    "RTX4090": Card("RTX 4090", "rtx4090", per_step=-0.5e-3, unequal_contexts=0.25e-6, cold_start=0.36),
    "RTXPRO6000": Card("RTX PRO 6000", "rtx-pro-6000", per_step=0.0, unequal_contexts=0.4e-6),
}

NOTE = """\
Both are overload runs: 300 requests arrive within 29 s, ten a second, and queue for up to {longest:.0f} s, so that a
prediction's error adds up over the whole run. The first card has memory for some 35 of them: running ones are preempted
all the time. vLLM's prefix caching was on, and which prompts begin alike is known (prefixes.csv): the replay shares
their blocks and computes them once. Two constants for each card stand for the engine around the kernels; they are
fitted to the run that they are used on, so the tables say how well the form fits, and the lines below them what the
kernels' times predict with nothing fitted. README.md has the details.
"""


def load_runs(data: Path) -> list[Run]:
    """The runs below ``data``."""
    return [read_run(data / name / "Llama-3.1-8B", card) for name, card in RUNS.items()]


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| | vLLM, ms | simulated, ms | error | LLMServingSim's | |", "|---|---:|---:|---:|---:|---|"]
    lines += [
        f"| {row.metric} {row.statistic} | {row.measured:,.1f} | {row.simulated:,.1f} | {row.error:+.1f}% "
        f"| {row.their_error:+.1f}% | {'no larger' if row.holds else 'larger'} |"
        for row in rows
    ]
    return "\n".join(lines)


def describe(run: Run, simulation: Simulation, wave: Wave) -> str:
    """In words."""
    lines = simulation.timelines
    first, last = (
        float(np.median(np.abs(ours - theirs)))
        for ours, theirs in ((lines.first_token, run.first_token), (lines.finish, run.finish))
    )
    return (
        f"Request by request, first and last tokens are off by {first:.2f} s and {last:.2f} s (medians over "
        f"{run.finish.max():.0f} s); in the first {wave.until:.0f} s, with {wave.num_first} first and {wave.num_last} "
        f"last tokens, by {wave.first_error:.3f} s and {wave.last_error:.3f} s."
    )


def constants(card: Card) -> str:
    """In words."""
    cold = f" The first step takes {card.cold_start:.2f} s more (a cold start)." if card.cold_start else ""
    return (
        f"Constants: {1e3 * card.per_step:+.2f} ms a step, {1e6 * card.unequal_contexts:.2f} us for each token that "
        f"the longest context of a step exceeds the mean one by.{cold}"
    )


def main() -> None:
    """Print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory with RTX4090/ and RTXPRO6000/")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="where results go")
    options = parser.parse_args()
    runs = load_runs(options.data)
    parts = [
        "# Two measured runs of vLLM 0.19, replayed",
        NOTE.format(longest=max(run.ttft.max() for run in runs)),
    ]
    result = {}
    for run in runs:
        simulation = replay(run)
        rows, bare = compare(run, simulation), compare(run, replay(run, KERNELS_ALONE))
        usage = simulation.instances[0]
        verdict = (
            f"{sum(row.holds for row in rows)} of {len(rows)} errors are no larger than LLMServingSim's "
            f"(its summary.txt). {usage.num_steps:,} steps, {usage.num_preempted} preemptions; at most "
            f"{run.max_num_seqs} sequences and {run.max_batch_tokens} tokens a step, {run.kv.num_blocks:,} blocks. "
            f"{usage.num_hit_tokens:,} of {run.prompt_lens.sum():,} prompt tokens were found computed."
        )
        num_bare = sum(row.holds for row in bare)
        means = ", ".join(f"{row.metric} {row.statistic} {row.error:+.1f}%" for row in bare if row.statistic == "Mean")
        parts += [
            f"## Llama-3.1-8B on one {run.card.name}",
            verdict,
            constants(run.card),
            table(rows),
            f"With the kernels' times alone, nothing fitted: {num_bare} of {len(bare)} errors are no larger; {means}.",
        ]
        if usage.num_preempted:
            parts.append(describe(run, simulation, first_wave(run, simulation)))
        result[run.card.name] = [asdict(row) | {"error": row.error} for row in rows]
    report = "\n\n".join(part.strip() for part in parts) + "\n"
    print(report)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.md").write_text(report, encoding="utf-8")
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
