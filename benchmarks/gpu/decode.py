"""Steps of the engine timed as an instance runs them: each launched before the tokens of the last one are there."""

import random
import statistics
import time
from collections import deque

from benchmarks.gpu.model import BLOCK_SIZE, EngineSizes, long_request, random_tokens
from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.engine.device.runner import DeviceRunner, PendingStep

_AHEAD = 2
_WARM_UP = 3


def decode_seconds(runner: DeviceRunner, sizes: EngineSizes, batch_size: int, repetitions: int) -> float:
    """Seconds of a decode step of ``batch_size`` sequences with ``sizes.context`` tokens of KV each.

    The median over ``repetitions`` of the mean over ``sizes.decode_steps`` steps, which are centred on that context.
    """
    rng = random.Random(1)
    first = sizes.context - sizes.decode_steps // 2
    num_blocks = -(-(first + sizes.decode_steps + _WARM_UP + 1) // BLOCK_SIZE)
    free = list(range(batch_size * num_blocks))
    rng.shuffle(free)
    seconds = []
    for _ in range(repetitions):
        request = long_request(random_tokens(rng, first, sizes.vocab_size), 2 * sizes.decode_steps)
        tables = []
        for seq_id in range(batch_size):
            runner.open(OpenSequence(seq_id, request, (0,), (), first - 1))
            tables.append(TableUpdate(seq_id, 0, tuple(free[seq_id * num_blocks : (seq_id + 1) * num_blocks])))
        chunks = tuple(Chunk(seq_id, 1, samples=True) for seq_id in range(batch_size))
        runner.launch(RunStep(0, chunks, tuple(tables))).wait()
        for step_id in range(1, _WARM_UP):
            runner.launch(RunStep(step_id, chunks)).wait()
        pending: deque[PendingStep] = deque()
        start = time.perf_counter()
        for step_id in range(sizes.decode_steps):
            pending.append(runner.launch(RunStep(step_id, chunks)))
            if len(pending) == _AHEAD:
                pending.popleft().wait()
        while pending:
            pending.popleft().wait()
        seconds.append((time.perf_counter() - start) / sizes.decode_steps)
        for seq_id in range(batch_size):
            runner.close(seq_id)
    return statistics.median(seconds)


def decode_bytes(sizes: EngineSizes, batch_size: int) -> int:
    """Bytes that a decode step cannot but read: every weight but the embeddings, and all KV of the sequences."""
    layout = sizes.layout(BLOCK_SIZE)
    item = layout.token_bytes // (2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim)
    return (sizes.layer_parameters + sizes.head_parameters) * item + batch_size * sizes.context * layout.token_bytes


def prefill_seconds(runner: DeviceRunner, sizes: EngineSizes, repetitions: int) -> float:
    """Seconds from the launch of a step with one prompt of ``sizes.prompt`` tokens to its token, the median."""
    rng = random.Random(2)
    blocks = list(range(-(-sizes.prompt // BLOCK_SIZE)))
    seconds = []
    for repetition in range(repetitions + 1):
        rng.shuffle(blocks)
        request = long_request(random_tokens(rng, sizes.prompt, sizes.vocab_size), 1)
        runner.open(OpenSequence(0, request, (0,), (), 0))
        chunk = Chunk(0, sizes.prompt, samples=True)
        start = time.perf_counter()
        runner.launch(RunStep(repetition, (chunk,), (TableUpdate(0, 0, tuple(blocks)),))).wait()
        seconds.append(time.perf_counter() - start)
        runner.close(0)
    # Kernels for a prompt of this length are compiled at the first.
    return statistics.median(seconds[1:])


def prefill_operations(sizes: EngineSizes) -> int:
    """Multiply-adds times 2 of that prompt: the layers' matrices, the causal half of attention, one row of logits."""
    num_tokens = sizes.prompt
    attention = 2 * sizes.num_layers * sizes.num_heads * sizes.head_dim * num_tokens * (num_tokens + 1)
    return 2 * num_tokens * sizes.layer_parameters + attention + 2 * sizes.head_parameters
