"""A mixed instance's scheduler with a worker under it, and nothing else: steps as a deployment makes them."""

import queue
from collections import defaultdict

from distserve.core.commands import CloseSequence, OpenSequence, RunStep, Send, WakeAt
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import Event, Received, StepDone, StepFailed
from distserve.core.messages import Abort, Failed, Prefill, Tokens
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request, TokenOutput
from distserve.engine.worker import Worker


class Driven:
    """Runs requests to their ends; as many steps are launched ahead as ``config`` lets be in flight."""

    def __init__(self, worker: Worker, config: SchedulerConfig) -> None:
        layout = worker.layout
        spec = InstanceSpec("mixed-0", Role.MIXED, KvConfig(layout.num_blocks, layout.block_size), config)
        self.worker = worker
        self.scheduler = MixedScheduler(spec)
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = defaultdict(list)
        self.failed: list[Failed] = []
        self.steps: list[RunStep] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._done: queue.SimpleQueue[StepDone | StepFailed] = queue.SimpleQueue()
        self._now = 0.0

    def submit(self, request: Request) -> None:
        self._handle(Received("router", Prefill(request)))

    def abort(self, request: Request) -> None:
        self._handle(Received("owner", Abort(request.key)))

    def finish_step(self) -> None:
        outcome = self._done.get(timeout=60)
        self.in_flight -= 1
        self._handle(outcome)

    def run_out(self) -> None:
        while self.in_flight:
            self.finish_step()

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        return {key: [output.token_id for output in outputs] for key, outputs in self.outputs.items()}

    def _handle(self, event: Event) -> None:
        self._now += 0.01
        for command in self.scheduler.handle(self._now, event):
            match command:
                case OpenSequence():
                    self.worker.open(command)
                case CloseSequence(seq_id):
                    self.worker.close(seq_id)
                case RunStep():
                    self.steps.append(command)
                    self.in_flight += 1
                    self.most_in_flight = max(self.most_in_flight, self.in_flight)
                    self.worker.launch(command, self._done.put)
                case Send(_, Tokens(outputs)):
                    for output in outputs:
                        self.outputs[output.request_id, output.choice].append(output)
                case Send(_, Failed() as failed):
                    self.failed.append(failed)
                case Send() | WakeAt():
                    pass
                case _:
                    raise AssertionError(command)
