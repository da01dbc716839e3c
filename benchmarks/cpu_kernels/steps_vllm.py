"""Measures the same steps in vLLM for CPU, in process; prints one JSON object, {case: seconds}.

Run by run.py with the interpreter of vLLM's own environment. A decode step is the difference between generating 2 and
34 tokens, divided by 32, at the same mean context as ours; a prefill is a prompt with one token of output.
"""

import json
import os
import random
import statistics
import sys
import time

STEPS = 32


def main() -> None:
    """Measures the cases of the command line: model directory, decode batches, context, prompt lengths, threads."""
    directory, batches, context, prompts, threads = sys.argv[1:]
    from vllm import LLM, SamplingParams

    clock = time.process_time if threads == "1" else time.perf_counter
    model = LLM(
        directory,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    draw = random.Random(0)

    def generate(num_prompts: int, length: int, num_tokens: int) -> float:
        tokens = [{"prompt_token_ids": [draw.randrange(2, 8000) for _ in range(length)]} for _ in range(num_prompts)]
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = clock()
        model.generate(tokens, sampling, use_tqdm=False)
        return clock() - start

    generate(1, 32, 4)
    generate(8, 32, 4)
    results = {}
    for size in map(int, batches.split(",")):
        length = int(context) - STEPS // 2 - 2
        pairs = [(generate(size, length, 2), generate(size, length, 2 + STEPS)) for _ in range(3)]
        results[f"decode {size}"] = statistics.median((long - short) / STEPS for short, long in pairs)
    for length in map(int, prompts.split(",")):
        results[f"prefill {length}"] = statistics.median(generate(1, length, 1) for _ in range(3))
    sys.stdout.flush()
    os.write(1, (json.dumps(results) + "\n").encode())


if __name__ == "__main__":
    main()
