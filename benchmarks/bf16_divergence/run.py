"""How often, and where, bfloat16 text depends on what a token happened to be computed with.

    python benchmarks/bf16_divergence/run.py [MODEL_DIR] [--output result.json]

The same prompts and seeds are run alone (the reference), in batches, with chunked prefill, and after recomputation;
in float32 too. The random numbers are the same each time, so a text that differs does so because rounding moved a
logit or a cumulated probability across a border. Reported per way: the share of texts that differ within their 128
tokens, and the share of tokens after which a text first differs (the chance per token).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.config import KvConfig
from distserve.core.request import Request, SamplingParams
from distserve.engine.worker import Worker

BLOCK_SIZE = 16
NUM_TOKENS = 128
NUM_PROMPTS = 32
PROMPT_LENGTHS = (12, 40, 90, 150)
MODES = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
}

Texts = list[list[int]]


class Runner:
    """Drives a worker: each sequence owns a fixed range of blocks."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        self.blocks_each = -(-(max(PROMPT_LENGTHS) + NUM_TOKENS + 1) // BLOCK_SIZE)
        self.worker = Worker(model_dir, dtype=dtype, kv=KvConfig(NUM_PROMPTS * self.blocks_each, BLOCK_SIZE))
        self.next_id = 0

    def generate(self, requests: Sequence[Request], batch_size: int, chunk: int, recompute_at: int = 0) -> Texts:
        """All requests' texts, ``batch_size`` at a time, prompts in chunks, perhaps recomputed on the way."""
        texts: Texts = []
        for start in range(0, len(requests), batch_size):
            texts += self._batch(requests[start : start + batch_size], chunk, recompute_at)
        return texts

    def _batch(self, requests: Sequence[Request], chunk: int, recompute_at: int) -> Texts:
        texts: Texts = [[] for _ in requests]
        ids = self._prefill(requests, texts, chunk)
        while len(texts[0]) < NUM_TOKENS:
            if len(texts[0]) == recompute_at:
                for seq_id in ids:
                    self.worker.close(seq_id)
                ids = self._prefill(requests, texts, chunk)
                continue
            chunks = tuple(Chunk(seq_id, 1, samples=True) for seq_id in ids)
            for text, token in zip(texts, self.worker.run(RunStep(0, chunks)).tokens, strict=True):
                text.append(token)
        for seq_id in ids:
            self.worker.close(seq_id)
        return texts

    def _prefill(self, requests: Sequence[Request], texts: Texts, chunk: int) -> list[int]:
        ids = []
        for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
            seq_id, self.next_id = self.next_id, self.next_id + 1
            ids.append(seq_id)
            self.worker.open(OpenSequence(seq_id, request, (0,), tuple(text), 0))
            blocks = tuple(range(row * self.blocks_each, (row + 1) * self.blocks_each))
            tables: tuple[TableUpdate, ...] = (TableUpdate(seq_id, 0, blocks),)
            left = len(request.prompt_token_ids) + len(text)
            while left:
                size = min(left, chunk)
                left -= size
                done = self.worker.run(RunStep(0, (Chunk(seq_id, size, samples=left == 0),), tables))
                tables = ()
            text.append(done.tokens[0])
        return ids


def compare(reference: Texts, texts: Texts) -> dict[str, float]:
    """How many texts differ from the reference, and the chance per token of parting from it."""
    common = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NUM_TOKENS)
        for pair in zip(reference, texts, strict=True)
    ]
    differing = [length for length in common if length < NUM_TOKENS]
    tokens = sum(common) + len(differing)
    return {
        "texts": len(common),
        "differing": len(differing),
        "per_token": len(differing) / tokens,
        "first_difference_median": float(sorted(differing)[len(differing) // 2]) if differing else float("nan"),
    }


def make_requests(model_dir: Path, sampling: dict[str, Any]) -> list[Request]:
    """Prompts cut out of documentation that Python ships with."""
    text = " ".join((value.__doc__ or "") for value in (argparse, json, Path, str, dict, list, int, torch.Tensor.sum))
    text = " ".join([text, *((getattr(str, name).__doc__ or "") for name in dir(str))])
    tokens = AutoTokenizer.from_pretrained(model_dir)(text, verbose=False)["input_ids"]
    requests = []
    for i in range(NUM_PROMPTS):
        length = PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]
        start = i * 37 % (len(tokens) - length)
        params = SamplingParams(max_tokens=NUM_TOKENS, seed=i, **sampling)
        requests.append(Request(str(i), "bench", tokens[start : start + length], params))
    return requests


def main() -> None:
    """Run every way in both data types; print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("distserve/demo/model"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Callable[[Runner, list[Request]], Texts]] = {
        "the same again": lambda runner, requests: runner.generate(requests, 1, 512),
        "batch of 8": lambda runner, requests: runner.generate(requests, 8, 512),
        "batch of 32": lambda runner, requests: runner.generate(requests, 32, 512),
        "prefill in chunks of 16": lambda runner, requests: runner.generate(requests, 1, 16),
        "recomputed after 40 tokens": lambda runner, requests: runner.generate(requests, 1, 512, 40),
    }
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    print(f"{'':10} {'':28} {'':28} {'differ':>8} {'per token':>10} {'first at (median)':>18}")
    for dtype in ("bfloat16", "float32"):
        runner = Runner(options.model, dtype)
        for mode, sampling in MODES.items():
            requests = make_requests(options.model, sampling)
            reference = runner.generate(requests, 1, 512)
            for way, run in ways.items():
                found = compare(reference, run(runner, requests))
                result.setdefault(dtype, {}).setdefault(mode, {})[way] = found
                share = f"{found['differing']}/{found['texts']}"
                print(
                    f"{dtype:10} {mode:28} {way:28} {share:>8} {found['per_token']:10.2%}"
                    f" {found['first_difference_median']:18.0f}",
                    flush=True,
                )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
