"""Draws the decode step over batch size against its roofline, from a result file.

    python -m benchmarks.gpu.plot benchmarks/gpu/results/h200.json

writes ``h200.png`` beside it. It needs matplotlib, which the machine with the card may lack.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], output: Path) -> None:
    """Write the picture of ``result``, the JSON object that benchmarks.gpu.run writes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = result["decode"]
    batches = [point["batch_size"] for point in points]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(batches, [point["seconds"] * 1e3 for point in points], marker="o", label="measured")
    roofline = [point["roofline_seconds"] * 1e3 for point in points]
    axes.plot(batches, roofline, linestyle="--", label="weights and KV at a copy's bandwidth")
    axes.plot(batches, [1.35 * each for each in roofline], linestyle=":", color="grey", label="1.35 of that")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences in the batch")
    axes.set_ylabel("decode step (ms)")
    card = result["run"].get("card", "a CPU: a rehearsal")
    axes.set_title(f"context {points[0]['context']} on {card}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw the decode step over batch size against its roofline.")
    parser.add_argument("result", type=Path, help="a JSON file written by benchmarks.gpu.run")
    options = parser.parse_args()
    plot(json.loads(options.result.read_text()), options.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
