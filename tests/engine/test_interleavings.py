"""A mixed scheduler on a real model: greedy tokens are those of generate, however requests come and memory goes."""

from dataclasses import replace
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.core.commands import CloseSequence, Command, OpenSequence, RunStep, Send
from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.events import Received, StepDone, Timer
from distserve.core.messages import Prefill, Tokens
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request
from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import make_request

BLOCK = 4


class Node:
    """The scheduler on the worker, which runs commands in order; a step's outcome is heard of when the test says so."""

    def __init__(self, worker: Worker, config: SchedulerConfig, num_blocks: int) -> None:
        self.worker = worker
        self.scheduler = MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KvConfig(num_blocks, BLOCK), config))
        self.launched: list[StepDone] = []
        self.num_open = 0
        self.tokens: dict[str, list[int]] = {}
        self.clock = count()
        self.take(self.scheduler.handle(0.0, Timer()))

    def submit(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self.take(self.scheduler.handle(float(next(self.clock)), Received("router", Prefill(request))))

    def step(self) -> None:
        self.take(self.scheduler.handle(float(next(self.clock)), self.launched.pop(0)))

    def take(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case OpenSequence():
                    self.worker.open(command)
                    self.num_open += 1
                case CloseSequence(seq_id):
                    self.worker.close(seq_id)
                    self.num_open -= 1
                case RunStep():
                    self.launched.append(self.worker.run(command))
                case Send(_, Tokens(outputs)):
                    for output in outputs:
                        self.tokens[output.request_id].append(output.token_id)


@settings(max_examples=30)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=8),
    policy=st.sampled_from(PrefillPolicy),
    budget=st.integers(8, 48),
    size=st.integers(1, 8),
    num_blocks=st.integers(16, 60),
    prefix_caching=st.booleans(),
    in_flight=st.sampled_from([(1, False), (2, False), (2, True)]),
)
def test_greedy_tokens_are_those_of_generate(
    llama: Served,
    llama_worker: Worker,
    arrivals: list[tuple[int, int]],
    policy: PrefillPolicy,
    budget: int,
    size: int,
    num_blocks: int,
    prefix_caching: bool,
    in_flight: tuple[int, bool],
) -> None:
    config = SchedulerConfig(
        max_batch_tokens=budget,
        max_batch_size=size,
        max_in_flight=in_flight[0],
        lookahead=in_flight[1],
        headroom=0.0,
        policy=policy,
        prefix_caching=prefix_caching,
    )
    node = Node(llama_worker, config, num_blocks)
    for i, (which, delay) in enumerate(arrivals):
        for _ in range(delay):
            if node.launched:
                node.step()
        request = make_request(llama.prompts[which], max_tokens=NUM_TOKENS)
        node.submit(replace(request, request_id=f"r{i}", arrival=float(i)))
    while node.launched:
        node.step()
    assert list(node.tokens.values()) == [llama.expected[which] for which, _ in arrivals]
    assert node.scheduler.blocks.num_free == num_blocks
    assert node.num_open == 0
