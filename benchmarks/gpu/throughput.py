"""Output tokens per second under a load that is all there at once: ours, and transformers' continuous batching.

Both answer the same requests with the same weights on the same card. Ours is a mixed instance's scheduler over the
engine, without processes or HTTP, as transformers' has none.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.gpu.model import BLOCK_SIZE, EngineSizes
from distserve.core.commands import CloseSequence, Command, OpenSequence, RunStep, Send
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import Received
from distserve.core.messages import Prefill, Tokens
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request
from distserve.engine.device.runner import DeviceRunner, PendingStep


def our_rate(runner: DeviceRunner, sizes: EngineSizes, requests: Sequence[Request]) -> float:
    """Output tokens per second from the first submission to the last token."""
    kv = KvConfig(sizes.layout(sizes.most_tokens).num_blocks, BLOCK_SIZE)
    config = SchedulerConfig(
        max_batch_tokens=sizes.max_batch_tokens,
        max_batch_size=max(sizes.batches),
        max_in_flight=2,
        lookahead=True,
        max_model_len=sizes.max_model_len,
    )
    scheduler = MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, kv, config))
    pending: deque[PendingStep] = deque()
    num_tokens = 0

    def execute(commands: Sequence[Command]) -> None:
        nonlocal num_tokens
        for command in commands:
            match command:
                case OpenSequence():
                    runner.open(command)
                case CloseSequence(seq_id):
                    runner.close(seq_id)
                case RunStep():
                    pending.append(runner.launch(command))
                case Send(_, Tokens(outputs)):
                    num_tokens += len(outputs)
                case _:
                    pass  # reports and timers: nobody listens

    start = time.perf_counter()
    for request in requests:
        execute(scheduler.handle(time.perf_counter() - start, Received("router", Prefill(request))))
    while pending:
        execute(scheduler.handle(time.perf_counter() - start, pending.popleft().wait()))
    seconds = time.perf_counter() - start
    assert num_tokens == sum(request.sampling.max_tokens for request in requests)
    return num_tokens / seconds


def transformers_rate(module: PreTrainedModel, sizes: EngineSizes, requests: Sequence[Request], *, tiny: bool) -> float:
    """The same by ``generate_batch``, its own choice of sizes but memory; its warm-up and captures do not count."""
    source: Any = module
    settings: Any = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers annotates no constructor
        max_new_tokens=sizes.num_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    if tiny:
        batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    else:
        # More than the load needs, and what is left is enough for ours afterwards.
        batching = ContinuousBatchingConfig(max_memory_percent=0.5)
    prompts = [list(request.prompt_token_ids) for request in requests]
    outputs = source.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
    answers = list(outputs.values())
    num_tokens = sum(len(answer.generated_tokens) for answer in answers)
    assert num_tokens == sum(request.sampling.max_tokens for request in requests), "it did not answer in full"
    first, last = min(answer.created_time for answer in answers), max(answer.lifespan[1] for answer in answers)
    rate: float = num_tokens / (last - first)
    return rate
