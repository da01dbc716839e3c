"""One set of decisions, two drivers: the cluster's driver and the simulator's loop give identical command traces.

The shipped :class:`distserve.cluster.driver.Driver` runs every part here on a virtual clock, its ports backed by the
same fake workers and delays that the simulator has, but by code of this test. Under preemption, abort, loss and n >
1.
"""

import heapq
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.cluster.driver import Driver, EngineCommand
from distserve.core.commands import (
    CancelMigrate,
    CloseSequence,
    Command,
    Conclude,
    Deliver,
    Migrate,
    OpenSequence,
    RunStep,
)
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.decode import DecodeScheduler
from distserve.core.events import (
    ClientGone,
    ClientRequest,
    Event,
    InstanceLost,
    InstanceUp,
    Machine,
    Migrated,
    Received,
    Timer,
)
from distserve.core.messages import Message
from distserve.core.mixed import MixedScheduler
from distserve.core.owner import Owner
from distserve.core.prefill import PrefillScheduler
from distserve.core.router import Router
from simulator.model import Delays
from tests.core.checking_worker import CheckingWorker
from tests.core.harness import STEP_TIME, Deployment, make_request, token_at

DELAYS = Delays()


class World:
    """Virtual time for drivers: calls queued by (time, order of queueing)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.parts: dict[str, Part] = {}
        self.turns: list[tuple[float, str, Event, list[Command]]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, self._count, call))
        self._count += 1

    def feed_at(self, time: float, name: str, event: Event) -> None:
        def call() -> None:
            if name in self.parts:
                self.parts[name].driver.feed(event)

        self.at(time, call)

    def run(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, call = heapq.heappop(self._queue)
            call()

    def lose(self, name: str) -> None:
        del self.parts[name]
        self.feed_at(self.now + DELAYS.loss, "router", InstanceLost(name))
        for part in self.parts.values():
            for pull in [pull for pull in part.pulls.values() if pull.source_id == name]:
                del part.pulls[pull.pull_id]
                self.feed_at(self.now, part.name, Migrated(pull.pull_id, ok=False, reason=f"{name} died"))


class Part:
    """All ports of one driver: network, timers, engine, migrator, sink and log."""

    def __init__(self, world: World, name: str, machine: Machine, block_size: int) -> None:
        self.world = world
        self.name = name
        self.worker = CheckingWorker(block_size, token_at)
        self.free_at = 0.0
        self.step_ends: dict[int, float] = {}
        self.pulls: dict[int, Migrate] = {}
        self.driver = Driver(machine, lambda: world.now, self, self, engine=self, migrator=self, sink=self, log=self)
        world.parts[name] = self
        world.at(world.now, self.driver.start)

    def send(self, to: str, message: Message) -> None:
        self.world.feed_at(self.world.now + DELAYS.message, to, Received(self.name, message))

    def wake_at(self, time: float) -> None:
        self.world.feed_at(max(time, self.world.now), self.name, Timer())

    def submit(self, command: EngineCommand) -> None:
        match command:
            case OpenSequence():
                self.worker.open(command)
            case CloseSequence():
                self.worker.close(command)
            case RunStep():
                shape, done = self.worker.run(command)
                self.free_at = max(self.world.now, self.free_at) + STEP_TIME.seconds(shape)
                self.step_ends[command.step_id] = self.free_at
                self.world.feed_at(self.free_at, self.name, done)

    def migrate(self, command: Migrate) -> None:
        source = self.world.parts.get(command.source_id)
        if source is None:
            failed = Migrated(command.pull_id, ok=False, reason=f"{command.source_id} is gone")
            self.world.feed_at(self.world.now, self.name, failed)
            return
        self.pulls[command.pull_id] = command
        late = len(command.src_blocks) - command.num_ready_blocks
        early = self.world.now + DELAYS.pull_latency + command.num_ready_blocks * DELAYS.seconds_per_block
        end = max(early, source.step_ends[command.ready_step]) + late * DELAYS.seconds_per_block

        def complete() -> None:
            if self.name in self.world.parts and self.pulls.pop(command.pull_id, None) is not None:
                self.driver.feed(Migrated(command.pull_id, ok=True))

        self.world.at(end, complete)

    def cancel(self, command: CancelMigrate) -> None:
        if self.pulls.pop(command.pull_id, None) is not None:
            self.world.feed_at(self.world.now, self.name, Migrated(command.pull_id, ok=False, reason="cancelled"))

    def deliver(self, command: Deliver) -> None:
        """The log has it."""

    def conclude(self, command: Conclude) -> None:
        """The log has it."""

    def event(self, now: float, event: Event) -> None:
        self.world.turns.append((now, self.name, event, []))

    def command(self, command: Command) -> None:
        self.world.turns[-1][3].append(command)


def build(pools: dict[Role, int], kv: KvConfig, config: SchedulerConfig) -> World:
    """The same parts in the same order as the simulated deployment."""
    world = World()
    Part(world, "router", Router(), 0)
    Part(world, "api-0", Owner("api-0"), 0)
    machines = {Role.PREFILL: PrefillScheduler, Role.DECODE: DecodeScheduler, Role.MIXED: MixedScheduler}
    for role, count in pools.items():
        for index in range(count):
            spec = InstanceSpec(f"{role}-{index}", role, kv, config)
            Part(world, spec.instance_id, machines[role](spec), kv.block_size)
            world.feed_at(0.0, "router", InstanceUp(spec))
    return world


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.integers(0, 60),
        st.integers(1, 3),
        st.floats(0, 0.4),
        st.one_of(st.none(), st.floats(0, 0.6)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=REQUESTS,
    pools=st.sampled_from([(1, 1, 0), (2, 2, 0), (0, 0, 2), (1, 0, 2)]),
    blocks=st.integers(24, 40),
    loss=st.one_of(st.none(), st.floats(0.05, 0.6)),
    lookahead=st.booleans(),
    caching=st.booleans(),
)
def test_identical_commands(
    requests: list[tuple[int, int, int, float, float | None]],
    pools: tuple[int, int, int],
    blocks: int,
    loss: float | None,
    lookahead: bool,
    caching: bool,
) -> None:
    kv = KvConfig(blocks, 4)
    config = SchedulerConfig(
        max_batch_tokens=24,
        max_batch_size=6,
        max_in_flight=1 + lookahead,
        lookahead=lookahead,
        headroom=0.0,
        prefix_caching=caching,
    )
    prefill, decode, mixed = pools
    simulated = Deployment(prefill=prefill, decode=decode, mixed=mixed, kv=kv, config=config, delays=DELAYS)
    driven = build({Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}, kv, config)
    for i, (prompt, seed, n, arrival, abandoned) in enumerate(requests):
        request = make_request(f"r{i}", prompt, seed=seed, max_tokens=22, n=n, arrival=arrival)
        simulated.submit(request)
        driven.feed_at(arrival, "api-0", ClientRequest(request))
        if abandoned is not None:
            simulated.abandon(arrival + abandoned, request.request_id)
            driven.feed_at(arrival + abandoned, "api-0", ClientGone(request.request_id))
    if loss is not None and (decode > 1 or mixed > 1):
        victim = "decode-0" if decode else "mixed-0"
        simulated.run(until=loss)
        driven.run(until=loss)
        simulated.lose(victim)
        driven.lose(victim)
    recorder = simulated.run(until=20.0)
    driven.run(until=20.0)
    expected = [(entry.time, entry.part, entry.event, list(entry.commands)) for entry in recorder.trace]
    assert len(driven.turns) == len(expected)
    for got, wanted in zip(driven.turns, expected, strict=True):
        assert got == wanted
    assert any(isinstance(command, RunStep) for _, _, _, commands in driven.turns for command in commands) or all(
        abandoned is not None for *_, abandoned in requests
    )
