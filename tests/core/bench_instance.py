"""One scheduler on a bench: messages in by hand, steps run when the test says so."""

from typing import TypeVar

from distserve.core.commands import (
    CancelMigrate,
    Chunk,
    CloseSequence,
    Command,
    Migrate,
    OpenSequence,
    RunStep,
    Send,
)
from distserve.core.events import Migrated, Received, StepDone, StepFailed, Timer
from distserve.core.messages import Leased, Message, Offer, Prefill, Prefilled, Tokens
from distserve.core.request import Request, TokenOutput
from distserve.core.scheduler import InstanceScheduler
from tests.core.checking_worker import CheckingWorker
from tests.core.harness import token_at

M = TypeVar("M")


class Bench:
    """Executes what a scheduler commands; steps wait in ``launched`` until :meth:`finish_step`."""

    def __init__(self, scheduler: InstanceScheduler, worker: type[CheckingWorker] = CheckingWorker) -> None:
        self.scheduler = scheduler
        self.worker = worker(scheduler.spec.kv.block_size, token_at)
        self.now = 0.0
        self.launched: list[tuple[RunStep, StepDone]] = []
        self.steps: list[RunStep] = []
        self.sent: list[tuple[str, Message]] = []
        self.opened: dict[int, Request] = {}
        self.forked: set[int] = set()
        """Sequences that started with their prompt's KV there."""
        self.resumed: set[int] = set()
        """Those that were preempted and found KV of theirs again."""
        self._known: set[tuple[str, tuple[int, ...]]] = set()
        self.pulls: list[Migrate] = []
        self.cancelled: list[int] = []
        self._take(scheduler.handle(self.now, Timer()))

    def receive(self, message: Message, sender: str = "router") -> None:
        self._take(self.scheduler.handle(self.now, Received(sender, message)))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._take(self.scheduler.handle(self.now, Timer()))

    def finish_step(self, seconds: float = 0.01) -> RunStep:
        self.now += seconds
        step, done = self.launched.pop(0)
        self._take(self.scheduler.handle(self.now, done))
        return step

    def fail_step(self) -> None:
        step, _ = self.launched.pop(0)
        self._take(self.scheduler.handle(self.now, StepFailed(step.step_id, "out of luck")))

    def finish_pull(self, *, ok: bool = True) -> None:
        pull = self.pulls.pop(0)
        self._take(self.scheduler.handle(self.now, Migrated(pull.pull_id, ok=ok)))

    def admit(self, request: Request, source: str = "prefill-0") -> None:
        """Walk a decode instance through one whole hand-off."""
        blocks = tuple(range(self.scheduler.spec.kv.blocks_for(request.num_prefill_tokens)))
        tokens = tuple(token_at(request, choice, 0) for choice in request.choices)
        self.receive(Offer(request, blocks, request.num_prefill_tokens, 0, 0), source)
        self.receive(Leased(request.key, 10.0), source)
        self.receive(Prefilled(request.key, tokens), source)
        self.finish_pull()

    def submit(self, request: Request) -> None:
        self.receive(Prefill(request))

    def named(self, step: RunStep) -> list[tuple[str, int, bool]]:
        """(request, tokens, samples) for each chunk."""
        return [(self.opened[chunk.seq_id].request_id, chunk.num_tokens, chunk.samples) for chunk in step.chunks]

    def messages(self, kind: type[M]) -> list[M]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def outputs(self) -> list[TokenOutput]:
        return [output for message in self.messages(Tokens) for output in message.outputs]

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case OpenSequence():
                    self.worker.open(command)
                    self.opened[command.seq_id] = command.request
                    whose = (command.request.request_id, command.choices)
                    if command.num_computed_tokens > 0:
                        (self.resumed if whose in self._known else self.forked).add(command.seq_id)
                    self._known.add(whose)
                case CloseSequence():
                    self.worker.close(command)
                case RunStep():
                    assert all(isinstance(chunk, Chunk) for chunk in command.chunks)
                    self.launched.append((command, self.worker.run(command)[1]))
                    self.steps.append(command)
                case Send(to, message):
                    self.sent.append((to, message))
                case Migrate():
                    self.pulls.append(command)
                case CancelMigrate(pull_id):
                    self.cancelled.append(pull_id)
