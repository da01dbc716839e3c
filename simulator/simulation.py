"""Run a workload through a modelled deployment: the one entry point of the planner, the fidelity checks and the CLI."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from distserve.bench.workload import Workload
from distserve.core.config import Role
from distserve.core.errors import ConfigError
from distserve.core.events import ClientRequest, InstanceDraining, InstanceUp, Received
from distserve.core.instance_machine import InstanceMachine
from distserve.core.messages import ChangeRole
from distserve.core.prefix import split_keys
from distserve.core.request import Request, SamplingParams
from distserve.core.role_changes import PATIENCE
from distserve.core.router import Router
from distserve.core.scheduler import ROUTER
from simulator.client import CLIENT, Client, Record
from simulator.engine import Engine
from simulator.host_loop import HostLoop
from simulator.loop import Loop
from simulator.model import ClusterModel
from simulator.pulls import PullNetwork, Pulls
from simulator.recorder import Recorder
from simulator.results import InstanceUsage, Simulation, TimelineTable
from simulator.worker import SimulatedWorker


class FaultKind(StrEnum):
    """What befalls an instance: it is there from then on, dies, takes nothing new, or becomes one of another role."""

    START = "start"
    LOSS = "loss"
    DRAIN = "drain"
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def role(self) -> Role | None:
        """The role that the instance is to change to, while it serves; None if it keeps its own."""
        return Role(self.value) if self.value in set(Role) else None


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``time`` seconds, ``kind`` befalls ``instance_id``; one whose first fault is START is absent before."""

    time: float
    kind: FaultKind
    instance_id: str

    def __str__(self) -> str:
        if self.kind.role is not None:
            return f"{self.instance_id} becomes {self.kind}"
        return f"{self.kind} of {self.instance_id}"


def simulate(
    model: ClusterModel,
    workload: Workload,
    *,
    until: float = float("inf"),
    faults: Sequence[Fault] = (),
    jump: bool = True,
    recorder: Recorder | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Simulation:
    """Offer ``workload`` (open loop: its arrivals must be given) to ``model`` until all is answered or ``until``.

    Deterministic: the same arguments give the same result, bit for bit. ``jump`` handles stretches of decode steps
    that nothing can change as one event; the timelines are the same without it, later. ``on_progress`` is told the
    number of requests that have ended, now and then. Prompts have a prefix in common where the workload says so;
    it is computed once where the instances' ``prefix_caching`` is on.

    Raises ConfigError for a workload without arrivals, a fault of an unknown instance, a change of role that the router
    refuses, or common prefixes on instances of several block sizes.
    """
    run = _Run(model, workload, jump=jump, recorder=recorder, on_progress=on_progress)
    with _no_garbage_collection():
        run.play(faults, until)
    return run.result()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A run makes millions of short-lived objects and no cycles: looking for some takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Run:
    def __init__(
        self,
        model: ClusterModel,
        workload: Workload,
        *,
        jump: bool,
        recorder: Recorder | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        if workload.arrivals is None:
            raise ConfigError("a simulated workload needs arrival times: closed-loop load is for a live endpoint")
        if (model.cluster is None) != (model.kv is None):
            raise ConfigError("a network needs both the cluster's links and the geometry of the KV cache")
        self._models = {instance.spec.instance_id: instance for instance in model.instances}
        self._jump = jump
        self._recorder = recorder
        self._on_progress = on_progress
        self._arrivals: list[float] = workload.arrivals.tolist()
        self._prompts: list[int] = workload.prompt_lens.tolist()
        self._outputs: list[int] = workload.output_lens.tolist()
        self._prefix_blocks = workload.prefix_blocks
        self._tokens_per_block = workload.block_tokens
        self._block_size = _block_size_of_prefixes(model)
        self._next = 0
        self._num_ended = 0
        self._progress: dict[str, int] = {}
        self._network = PullNetwork(model) if model.cluster is not None and model.kv is not None else None
        pulls = Pulls(model.delays, self._network, recorder)
        self._loop = (
            Loop(model.delays, pulls=pulls) if model.host is None else HostLoop(model.host, model.delays, pulls=pulls)
        )
        self._client = Client(self._progress, self._on_end)
        self._lives: dict[str, list[tuple[Engine, InstanceMachine]]] = {instance_id: [] for instance_id in self._models}
        """Of each instance, every time that it was started."""
        self._noticed_at: dict[str, float] = {}
        """When the router hears, or heard, of an instance's loss."""
        self._changing: set[str] = set()
        """Instances that change their role at some time: their steps are not jumped over."""
        self._table = TimelineTable(len(workload), list(self._models))
        self._loop.add(ROUTER, Router(model.router))
        self._loop.add(CLIENT, self._client)

    # -- the run ------------------------------------------------------------------------------------------------------

    def play(self, faults: Sequence[Fault], until: float) -> None:
        """Until all is answered, or ``until``."""
        ordered = sorted(faults, key=lambda fault: fault.time)
        late: dict[str, FaultKind] = {}
        for fault in ordered:
            if fault.instance_id not in self._models:
                known = ", ".join(self._models)
                raise ConfigError(f"no instance is called {fault.instance_id}; there are {known}")
            late.setdefault(fault.instance_id, fault.kind)
            if fault.kind.role is not None:
                self._changing.add(fault.instance_id)
        for instance_id in self._models:
            if late.get(instance_id) is not FaultKind.START:
                self._start(instance_id)
        self._offer_next()
        for fault in ordered:
            if fault.time > until:
                break
            self._run_until(fault.time)
            if self._loop.is_stopped:
                return  # all was answered before
            self._befall(fault)
        self._run_until(until)

    def _run_until(self, until: float) -> None:
        """Requests are put on the heap one ahead: a trace of millions waits outside of it."""
        loop = self._loop
        while not loop.is_stopped:
            arrival = self._arrivals[self._next] if self._next < len(self._arrivals) else float("inf")
            loop.run(min(arrival, until))
            for refused in self._client.refusals:
                raise ConfigError(f"a change of role is not possible: {refused.reason}")
            if arrival > until or loop.is_stopped:
                return
            self._offer_next()

    def _offer_next(self) -> None:
        if self._next >= len(self._arrivals):
            return
        index = self._next
        self._next += 1
        arrival = self._arrivals[index]
        request = Request(
            request_id=str(index),
            owner_id=CLIENT,
            prompt_token_ids=range(self._prompts[index]),
            sampling=SamplingParams(max_tokens=self._outputs[index], ignore_eos=True),
            arrival=arrival,
            block_keys=self._block_keys(index),
        )
        self._loop.post(arrival, CLIENT, ClientRequest(request))

    def _block_keys(self, index: int) -> tuple[int, ...]:
        """What a prompt's blocks hold, as far as the workload says; its tokens say nothing."""
        if self._prefix_blocks is None or self._block_size is None:
            return ()
        blocks = self._prefix_blocks[index]
        return split_keys(blocks, self._tokens_per_block, self._prompts[index], self._block_size)

    def _start(self, instance_id: str) -> None:
        model = self._models[instance_id]
        spec = model.spec
        machine = InstanceMachine(spec)
        engine = Engine(
            instance_id,
            SimulatedWorker(self._progress),
            model.step_time,
            spec.parallel.pp,
            spec.parallel.tp,
            self._recorder,
        )
        self._lives[instance_id].append((engine, machine))
        if instance_id in self._changing:
            self._loop.add(instance_id, machine, engine)
        else:
            may_jump = self._jump and spec.role is not Role.PREFILL and spec.scheduler.max_in_flight == 1
            self._loop.add(instance_id, machine.scheduler, engine, may_jump=may_jump)
        # One that starts again before its loss is noticed counts as up only then: the router would take it for the old.
        self._loop.post(max(self._loop.now, self._noticed_at.get(instance_id, 0.0)), ROUTER, InstanceUp(spec))

    def _befall(self, fault: Fault) -> None:
        self._loop.now = max(self._loop.now, fault.time)
        if fault.kind is FaultKind.START:
            self._start(fault.instance_id)
        elif fault.kind is FaultKind.LOSS:
            self._noticed_at[fault.instance_id] = self._loop.lose(fault.instance_id)
        elif fault.kind.role is not None:
            change = ChangeRole(fault.instance_id, fault.kind.role, PATIENCE)
            self._loop.post(fault.time, ROUTER, Received(CLIENT, change))
        else:
            self._loop.post(fault.time, ROUTER, InstanceDraining(fault.instance_id))

    def _on_end(self, record: Record) -> None:
        self._table.put(int(record.request.request_id), record)
        self._num_ended += 1
        if self._on_progress is not None and self._num_ended % 256 == 0:
            self._on_progress(self._num_ended)
        if self._num_ended == len(self._arrivals):
            self._loop.stop()

    # -- what came of it ----------------------------------------------------------------------------------------------

    def result(self) -> Simulation:
        """Timelines and usage."""
        for record in self._client.live.values():
            self._table.put(int(record.request.request_id), record)
        timelines = self._table.finish(self._arrivals, self._prompts, self._outputs)
        usages = tuple(self._usage(instance_id) for instance_id in self._models)
        now = self._loop.now
        links = self._network.usage(now) if self._network is not None else ()
        return Simulation(timelines, usages, links, now, self._loop.num_events)

    def _usage(self, instance_id: str) -> InstanceUsage:
        spec = self._models[instance_id].spec
        engines = [engine for engine, _ in self._lives[instance_id]]
        schedulers = [machine.scheduler for _, machine in self._lives[instance_id]]
        totals = [scheduler.totals for scheduler in schedulers]
        return InstanceUsage(
            instance_id=instance_id,
            role=schedulers[-1].spec.role if schedulers else spec.role,
            busy=sum(engine.busy for engine in engines),
            num_steps=sum(engine.num_steps for engine in engines),
            num_tokens=sum(engine.num_tokens for engine in engines),
            num_sequences=sum(engine.num_sequences for engine in engines),
            num_preempted=sum(count.num_preempted for count in totals),
            peak_kv_blocks=max((scheduler.blocks.peak_used for scheduler in schedulers), default=0),
            num_kv_blocks=spec.kv.num_blocks,
            num_hit_tokens=sum(count.num_hit_tokens for count in totals),
            num_queried_tokens=sum(count.num_queried_tokens for count in totals),
        )


def _block_size_of_prefixes(model: ClusterModel) -> int | None:
    """The block size of the instances that look for prefixes; None if there are none."""
    sizes = {instance.spec.kv.block_size for instance in model.instances if instance.spec.scheduler.prefix_caching}
    if len(sizes) > 1:
        raise ConfigError(f"instances that cache prefixes need one block size, not {sorted(sizes)}")
    return sizes.pop() if sizes else None
