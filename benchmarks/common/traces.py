"""Writes a workload as a trace that other clients read too."""

import json
from pathlib import Path

import numpy as np

from distserve.bench.traces import MOONCAKE_BLOCK_TOKENS
from distserve.bench.workload import Workload


def write_trace(path: Path, workload: Workload) -> None:
    """``workload`` in Mooncake's format, in which no two prompts have a block in common; closed loop's come at once."""
    arrivals = workload.arrivals if workload.arrivals is not None else np.zeros(len(workload))
    next_block, lines = 0, []
    for arrival, prompt, output in zip(arrivals, workload.prompt_lens, workload.output_lens, strict=True):
        num_blocks = -(-int(prompt) // MOONCAKE_BLOCK_TOKENS)
        lines.append(
            {
                "timestamp": round(1000 * float(arrival - arrivals[0]), 3),
                "input_length": int(prompt),
                "output_length": int(output),
                "hash_ids": list(range(next_block, next_block + num_blocks)),
            }
        )
        next_block += num_blocks
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
