"""Replays two measured runs of vLLM on simulated mixed instances and compares every number.

    python -m benchmarks.fidelity_vllm.run ../shared/data/groundtruth/llmservingsim

prints the tables and writes them into ``results`` beside this file. Takes seconds.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.fidelity_vllm.compare import Row, Wave, compare, first_wave
from benchmarks.fidelity_vllm.replay import COSTS, KERNELS_ALONE, Run, read_run, replay

RUNS = {"RTX4090": ("RTX 4090", "rtx4090"), "RTXPRO6000": ("RTX PRO 6000", "rtx-pro-6000")}

NOTE = """\
Both are overload runs: 300 requests arrive within 29 s, ten a second, and queue for up to {longest:.0f} s, so that a
prediction's error adds up over the whole run. The first card has memory for some 35 of them: running ones are preempted
all the time, and vLLM's prefix caching was on. Of the prompts only lengths are known, so what one of them shares with
another is computed again here; a preempted sequence does find its own blocks again. Constants beside the kernels' times
are the same for both cards: {gap:.2f} ms from step to step, {unequal:.1%} on decode attention.
"""


def load_runs(data: Path) -> list[Run]:
    """The runs below ``data``."""
    return [read_run(data / name / "Llama-3.1-8B", card, gpu) for name, (card, gpu) in RUNS.items()]


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| | vLLM, ms | simulated, ms | error | LLMServingSim's | |", "|---|---:|---:|---:|---:|---|"]
    lines += [
        f"| {row.metric} {row.statistic} | {row.measured:,.1f} | {row.simulated:,.1f} | {row.error:+.1f}% "
        f"| {row.their_error:+.1f}% | {'no larger' if row.holds else 'larger'} |"
        for row in rows
    ]
    return "\n".join(lines)


def describe(wave: Wave) -> str:
    """In words."""
    return (
        f"In the first {wave.until:.0f} s {wave.num_first} requests have their first token and {wave.num_last} their "
        "last, preempting each other, before prompts share blocks that were computed for others: the replay's are off "
        f"by {wave.first_error:.3f} s and {wave.last_error:.3f} s (medians). Where it departs then, and why, is in "
        "README.md."
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
        NOTE.format(
            longest=max(run.ttft.max() for run in runs), gap=1e3 * COSTS.per_step, unequal=COSTS.unequal_contexts
        ),
    ]
    result = {}
    for run in runs:
        simulation = replay(run)
        rows, bare = compare(run, simulation), compare(run, replay(run, KERNELS_ALONE))
        usage = simulation.instances[0]
        verdict = (
            f"{sum(row.holds for row in rows)} of {len(rows)} errors are no larger than LLMServingSim's "
            f"(its summary.txt). {usage.num_steps:,} steps, {usage.num_preempted} preemptions; at most "
            f"{run.max_num_seqs} sequences and {run.max_batch_tokens} tokens a step, {run.kv.num_blocks:,} blocks."
        )
        means = ", ".join(f"{row.metric} {row.statistic} {row.error:+.1f}%" for row in bare if row.statistic == "Mean")
        parts += [
            f"## Llama-3.1-8B on one {run.card}",
            verdict,
            table(rows),
            f"With the kernels' times alone: {means}.",
        ]
        if usage.num_preempted:
            parts.append(describe(first_wave(run, simulation)))
        result[run.card] = [asdict(row) | {"error": row.error} for row in rows]
    report = "\n\n".join(part.strip() for part in parts) + "\n"
    print(report)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.md").write_text(report, encoding="utf-8")
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
