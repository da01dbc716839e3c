"""A closed loop in simulation, with the time of every token.

So many clients at one mixed instance, each sending its next request when it has its last answer. The parts are those
of :func:`simulator.simulation.simulate`, which is for open loops and keeps first and last tokens only. The result is in
the records of ``distserve bench``, so that its figures, DeepSpeed-FastGen's among them, are computed by its own code.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distserve.bench.lengths import Lengths
from distserve.bench.records import RequestRecord, Status
from distserve.core.config import Role
from distserve.core.events import ClientRequest, InstanceUp
from distserve.core.latency import StepShape
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request, SamplingParams
from distserve.core.router import Router, RouterConfig
from distserve.core.scheduler import ROUTER
from simulator.client import CLIENT, Client, Record
from simulator.engine import Engine
from simulator.loop import Loop
from simulator.model import Delays, InstanceModel
from simulator.worker import SimulatedWorker

_SAME = 1e-6
"""Seconds; steps are thousands of times longer."""


@dataclass
class StepLog:
    """Implements :class:`simulator.recorder.Recorder`: when the steps in which somebody decoded ended."""

    decode_ends: list[float] = field(default_factory=list)

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:  # noqa: ARG002 -- the protocol's
        """See :class:`simulator.recorder.Recorder`."""
        if shape.num_decodes:
            self.decode_ends.append(end)

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        """See :class:`simulator.recorder.Recorder`; a mixed instance pulls nothing."""

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        """See :class:`simulator.recorder.Recorder`; there are no links."""


def closed_loop(
    instance: InstanceModel, prompt_lens: Lengths, output_lens: Lengths, starts: list[float]
) -> list[RequestRecord]:
    """Serve the requests in order to as many clients as there are ``starts`` (seconds at which each begins).

    ``instance`` must be mixed, of one stage, and have memory for all clients' requests at once.
    """
    spec = instance.spec
    assert spec.role is Role.MIXED
    assert spec.parallel.pp == 1
    run = _ClosedLoop(instance, prompt_lens.tolist(), output_lens.tolist())
    run.play(starts)
    return run.records()


class _ClosedLoop:
    def __init__(self, instance: InstanceModel, prompts: list[int], outputs: list[int]) -> None:
        self._prompts, self._outputs = prompts, outputs
        self._next = 0
        self._ended: dict[int, Record] = {}
        self._log = StepLog()
        self._delay = Delays().message
        progress: dict[str, int] = {}
        spec = instance.spec
        self._scheduler = MixedScheduler(spec)
        engine = Engine(spec.instance_id, SimulatedWorker(progress), instance.step_time, recorder=self._log)
        self._loop = Loop(Delays())
        self._loop.add(ROUTER, Router(RouterConfig(max_wait=float("inf"))))
        self._loop.add(CLIENT, Client(progress, self._on_end))
        self._loop.add(spec.instance_id, self._scheduler, engine, may_jump=True)
        self._loop.post(0.0, ROUTER, InstanceUp(spec))

    def play(self, starts: list[float]) -> None:
        """Until all is answered."""
        for start in starts:
            self._send(start)
        self._loop.run()

    def _send(self, at: float) -> None:
        if self._next >= len(self._prompts):
            return
        index = self._next
        self._next += 1
        request = Request(
            request_id=str(index),
            owner_id=CLIENT,
            prompt_token_ids=range(self._prompts[index]),
            sampling=SamplingParams(max_tokens=self._outputs[index], ignore_eos=True),
            arrival=at,
            block_keys=(),
        )
        self._loop.post(at, CLIENT, ClientRequest(request))

    def _on_end(self, record: Record) -> None:
        self._ended[int(record.request.request_id)] = record
        self._send(self._loop.now)
        if len(self._ended) == len(self._prompts):
            self._loop.stop()

    def records(self) -> list[RequestRecord]:
        """What a client of the endpoint would have noted, in order of sending."""
        assert self._scheduler.totals.num_preempted == 0, "tokens of preempted sequences are not in every step"
        # Who is past its prompt has a token in every step that decodes, under both policies.
        seen = np.array(self._log.decode_ends) + self._delay
        found = []
        for index, record in sorted(self._ended.items()):
            assert record.status == 200
            assert record.first_token is not None
            assert record.finish is not None
            num_tokens = self._outputs[index]
            first = int(np.searchsorted(seen, record.first_token + _SAME))
            times = [record.first_token, *seen[first : first + num_tokens - 1].tolist()]
            assert len(times) == num_tokens
            assert abs(times[-1] - record.finish) < _SAME
            arrival = record.request.arrival
            made = RequestRecord(index, arrival, self._prompts[index], num_tokens, sent=arrival, end=record.finish)
            made.status, made.num_prompt_tokens, made.num_output_tokens = Status.OK, made.prompt_len, num_tokens
            made.event_times = array("d", times)
            found.append(made)
        return found
