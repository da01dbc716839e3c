"""The engine thread over a device: steps are launched one behind the other, and outcomes come when they come."""

import queue
import threading

import pytest
import torch

from distserve.cluster.engine_thread import EngineThread
from distserve.core.commands import Chunk, CloseSequence, OpenSequence, RunStep, TableUpdate
from distserve.core.config import KvConfig
from distserve.core.events import StepDone, StepFailed
from distserve.core.request import Request, SamplingParams
from distserve.demo import model_dir
from distserve.engine.device.backend import Download, HostBackend
from distserve.engine.worker import Worker


class SlowBackend(HostBackend):
    """Nothing arrives on the host before it is let."""

    def __init__(self):
        super().__init__()
        self.may_arrive = threading.Event()
        self.num_launched = 0

    def download(self, tensors):
        self.num_launched += 1
        return _Late(super().download(tensors), self.may_arrive)


class _Late:
    def __init__(self, download: Download, may_arrive: threading.Event):
        self._download, self._may_arrive = download, may_arrive

    def wait(self) -> tuple[torch.Tensor, ...]:
        assert self._may_arrive.wait(60)
        return self._download.wait()


class Announcements:
    """What a transport hears."""

    def __init__(self):
        self.heard: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()

    def begin_step(self, step_id):
        self.heard.put(("begin", step_id))

    def layer_done(self, step_id, layer):
        self.heard.put(("layer", step_id, layer))

    def end_step(self, step_id):
        self.heard.put(("end", step_id))


@pytest.fixture
def bench():
    backend, transport, outcomes = SlowBackend(), Announcements(), queue.SimpleQueue()
    thread = EngineThread(
        lambda: Worker(model_dir(), kv=KvConfig(16), backend=backend, max_batch_size=2), transport, outcomes.put
    )
    thread.start()
    yield backend, transport, outcomes, thread
    backend.may_arrive.set()
    thread.close()


def heard(transport, step_id):
    items = []
    while not items or items[-1] != ("end", step_id):
        items.append(transport.heard.get(timeout=60))
    return items


def test_steps_are_launched_before_the_last_ones_tokens_are_there(bench):
    backend, transport, outcomes, thread = bench
    request = Request("r", "owner", (5, 6, 7), SamplingParams(max_tokens=8, temperature=0.0))
    thread.submit(OpenSequence(1, request, (0,), (), 0))
    thread.submit(RunStep(0, (Chunk(1, 3, samples=True),), (TableUpdate(1, 0, (4,)),)))
    chunks = (Chunk(1, 1, samples=True),)
    thread.submit(RunStep(1, chunks))
    thread.submit(RunStep(2, chunks))
    for step_id in range(3):
        layers = [item for item in heard(transport, step_id) if item[0] == "layer"]
        assert layers == [("layer", step_id, layer) for layer in range(len(layers))]
        assert layers
    assert backend.num_launched == 3
    assert outcomes.empty()
    backend.may_arrive.set()
    done = [outcomes.get(timeout=60) for _ in range(3)]
    assert [outcome.step_id for outcome in done] == [0, 1, 2]
    again = Worker(model_dir(), kv=KvConfig(16))
    again.open(OpenSequence(1, request, (0,), (), 0))
    expected = [again.run(RunStep(0, (Chunk(1, 3, samples=True),), (TableUpdate(1, 0, (4,)),)))]
    expected += [again.run(RunStep(1 + step, chunks)) for step in range(2)]
    assert [outcome.tokens for outcome in done] == [outcome.tokens for outcome in expected]


def test_a_step_that_cannot_be_launched_fails_alone(bench):
    backend, _, outcomes, thread = bench
    backend.may_arrive.set()
    params = SamplingParams(max_tokens=8, temperature=0.0)
    for seq_id, token in ((1, 10**9), (2, 5)):
        thread.submit(OpenSequence(seq_id, Request("r", "owner", (token,), params), (0,), (), 0))
        thread.submit(RunStep(seq_id, (Chunk(seq_id, 1, samples=True),), (TableUpdate(seq_id, 0, (seq_id,)),)))
        thread.submit(CloseSequence(seq_id))
    failed, done = outcomes.get(timeout=60), outcomes.get(timeout=60)
    assert isinstance(failed, StepFailed)
    assert "vocabulary" in failed.reason
    assert isinstance(done, StepDone)
    assert len(done.tokens) == 1
