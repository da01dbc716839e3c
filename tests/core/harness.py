"""A whole simulated deployment for tests: owner, router and instances on the loop, every turn recorded."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from distserve.core.commands import Conclude, Deliver, Migrate, RunStep
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import ClientGone, ClientRequest, ClientStop, InstanceUp, Migrated, Received
from distserve.core.instance_machine import InstanceMachine
from distserve.core.latency import LinearStepTime
from distserve.core.messages import ChangeRole
from distserve.core.owner import Owner
from distserve.core.request import Request, SamplingParams
from distserve.core.router import Router, RouterConfig
from distserve.core.scheduler import ROUTER, InstanceScheduler
from simulator.engine import Engine
from simulator.loop import Loop, TraceEntry
from simulator.model import Delays
from tests.core.checking_worker import CheckingWorker
from tests.core.remembering_worker import RememberingWorker

EOS = 0
LONG = 150.0
"""Seconds, more than any time-out; idle instances say every few seconds that they are."""
STEP_TIME = LinearStepTime(base=0.01, per_token=0.0005, per_pair=1e-7, per_context=1e-6)


def token_at(request: Request, choice: int, index: int) -> int:
    """Deterministic stand-in for a model: the seed gives the length at which end-of-sequence comes."""
    length = 1 + (request.sampling.seed + 7 * choice) % 23
    if index + 1 == length:
        return EOS
    digest = hashlib.blake2b(f"{request.sampling.seed}/{choice}/{index}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % 1000


def expected_tokens(request: Request, choice: int) -> list[int]:
    """The whole output of one choice."""
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens:
        tokens.append(token_at(request, choice, len(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens


def make_request(
    name: str, prompt: int, *, seed: int = 5, max_tokens: int = 16, n: int = 1, arrival: float = 0.0
) -> Request:
    return Request(
        request_id=name,
        owner_id="api-0",
        prompt_token_ids=range(1, prompt + 1),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, eos_token_ids=(EOS,)),
        choices=tuple(range(n)),
        arrival=arrival,
    )


@dataclass
class Recorder:
    """Collects turns, and what reached the client."""

    trace: list[TraceEntry] = field(default_factory=list)
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[tuple[str, int], str] = field(default_factory=dict)
    concluded: dict[str, Conclude] = field(default_factory=dict)
    marks: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    cached: dict[str, int] = field(default_factory=dict)
    """Tokens of each prompt that its first token said were there."""

    def on_turn(self, entry: TraceEntry) -> None:
        self.trace.append(entry)
        for command in entry.commands:
            if isinstance(command, Deliver):
                for output in command.outputs:
                    self.tokens[output.request_id, output.choice].append(output.token_id)
                    assert output.index == len(self.tokens[output.request_id, output.choice]) - 1
                    self.marks[output.request_id].update(output.marks)
                    if output.index == 0:
                        self.cached[output.request_id] = output.num_cached_tokens
                    if output.finish_reason is not None:
                        self.finish[output.request_id, output.choice] = output.finish_reason
            elif isinstance(command, Conclude):
                assert command.request_id not in self.concluded, "concluded twice"
                self.concluded[command.request_id] = command

    def pulls(self, part: str) -> list[Migrate]:
        return [c for entry in self.trace if entry.part == part for c in entry.commands if isinstance(c, Migrate)]

    def steps(self, part: str) -> list[RunStep]:
        return [c for entry in self.trace if entry.part == part for c in entry.commands if isinstance(c, RunStep)]


class CopyingRecorder(Recorder):
    """Lets memory follow the pulls between ``workers``: a pull that ended well has read what is there now."""

    def __init__(self, workers: dict[str, CheckingWorker]) -> None:
        super().__init__()
        self._workers = workers
        self._pulls: dict[tuple[str, int], Migrate] = {}

    def on_turn(self, entry: TraceEntry) -> None:
        super().on_turn(entry)
        if isinstance(entry.event, Migrated):
            pull = self._pulls.pop((entry.part, entry.event.pull_id))
            source, puller = self._workers.get(pull.source_id), self._workers.get(entry.part)
            if entry.event.ok:
                assert isinstance(source, RememberingWorker)
                assert isinstance(puller, RememberingWorker)
                puller.copy_from(source, pull.src_blocks, pull.dst_blocks)
        for command in entry.commands:
            if isinstance(command, Migrate):
                self._pulls[entry.part, command.pull_id] = command


class Deployment:
    """``prefill`` + ``decode`` + ``mixed`` instances behind one router and one owner.

    With ``remembers`` the workers know what their memory holds, and check that sequences read what is theirs.
    """

    def __init__(
        self,
        *,
        prefill: int = 1,
        decode: int = 1,
        mixed: int = 0,
        kv: KvConfig = KvConfig(num_blocks=64, block_size=4),
        decode_kv: KvConfig | None = None,
        config: SchedulerConfig = SchedulerConfig(max_batch_tokens=32, max_batch_size=8),
        delays: Delays = Delays(),
        router: RouterConfig = RouterConfig(),
        remembers: bool = False,
    ) -> None:
        self.machines: dict[str, InstanceMachine] = {}
        self.workers: dict[str, CheckingWorker] = {}
        self.recorder = CopyingRecorder(self.workers) if remembers else Recorder()
        self.loop = Loop(delays, self.recorder)
        self.owner = Owner("api-0")
        self.submitted: list[Request] = []
        self.abandoned: set[str] = set()
        """Requests whose clients do not wait for the end."""
        self._worker = RememberingWorker if remembers else CheckingWorker
        self.loop.add(ROUTER, Router(router))
        self.loop.add("api-0", self.owner)
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.MIXED, mixed)):
            memory = decode_kv if role is Role.DECODE and decode_kv is not None else kv
            for index in range(count):
                self.start(InstanceSpec(f"{role}-{index}", role, memory, config))

    def start(self, spec: InstanceSpec) -> None:
        machine = InstanceMachine(spec)
        worker = self._worker(spec.kv.block_size, token_at)
        self.machines[spec.instance_id] = machine
        self.workers[spec.instance_id] = worker
        self.loop.add(spec.instance_id, machine, Engine(spec.instance_id, worker, STEP_TIME))
        self.loop.post(self.loop.now, ROUTER, InstanceUp(spec))

    @property
    def schedulers(self) -> dict[str, InstanceScheduler]:
        """Of the roles that the instances have now."""
        return {name: machine.scheduler for name, machine in self.machines.items()}

    def change_role(self, time: float, name: str, role: Role, patience: float = 30.0) -> None:
        self.loop.post(time, ROUTER, Received("operator", ChangeRole(name, role, patience)))

    def submit(self, request: Request) -> None:
        self.submitted.append(request)
        self.loop.post(request.arrival, "api-0", ClientRequest(request))

    def stop(self, time: float, request_id: str, choice: int, num_tokens: int) -> None:
        self.loop.post(time, "api-0", ClientStop(request_id, choice, num_tokens))

    def abandon(self, time: float, request_id: str) -> None:
        self.abandoned.add(request_id)
        self.loop.post(time, "api-0", ClientGone(request_id))

    def lose(self, name: str) -> None:
        self.loop.lose(name)
        del self.machines[name]
        del self.workers[name]

    def lose_some(self, losses: Iterable[tuple[float, int]], needed: Collection[Role] = tuple(Role)) -> None:
        """Run to each of the times (s) and lose one instance then, by its index.

        The last one of a role that is ``needed`` stays: without it requests would rightly get 503.
        """
        for time, index in sorted(losses):
            self.run(until=time)
            victim = sorted(self.schedulers)[index % len(self.schedulers)]
            role = self.schedulers[victim].spec.role
            num_alike = sum(scheduler.spec.role is role for scheduler in self.schedulers.values())
            if num_alike > 1 or role not in needed:
                self.lose(victim)

    def run(self, until: float | None = None) -> Recorder:
        """Until a time (s), or until all is long over: nothing is live, and what waits to be given up has been."""
        if until is not None:
            self.loop.run(until)
            return self.recorder
        self.loop.run(self.loop.now + LONG)
        while self.owner.num_live and self.loop.now < 1000:
            self.loop.run(self.loop.now + LONG)
        self.loop.run(self.loop.now + LONG)
        return self.recorder

    def assert_served(self) -> None:
        """Every request has its whole output, if it was abandoned the beginning of it, and nothing is left."""
        for request in self.submitted:
            is_abandoned = request.request_id in self.abandoned
            for choice in request.choices:
                got, expected = self.recorder.tokens[request.request_id, choice], expected_tokens(request, choice)
                assert got == (expected[: len(got)] if is_abandoned else expected)
            if not is_abandoned:
                assert self.recorder.concluded[request.request_id].status == 200
        self.assert_clean()

    def assert_clean(self) -> None:
        """Nothing is left anywhere: no request, no block, no sequence."""
        assert self.owner.num_live == 0
        for name, scheduler in self.schedulers.items():
            assert scheduler.blocks.num_free == scheduler.blocks.num_blocks, f"{name} leaks blocks"
            assert not scheduler.blocks.has_shared, f"{name} leaks references"
            assert self.workers[name].num_open == 0, f"{name} leaks sequences"
