"""Pulls over a link: those between two instances take turns, those of several pairs share it."""

from types import SimpleNamespace
from typing import Any

import pytest

from distserve.core.commands import Migrate
from distserve.core.config import InstanceSpec, KvConfig, Role
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import ClusterModel, Delays, InstanceModel, KvGeometry
from simulator.pulls import PullNetwork, Pulls

SECONDS_PER_BLOCK = 0.16
"""16 tokens of 100 bytes over 10 kB/s."""
READY: Any = SimpleNamespace(step_starts={}, step_ends={})


def pulls(num_prefill: int = 1, num_decode: int = 1) -> Pulls:
    """On two nodes, all prefill instances on one and all decode instances on the other."""
    no_step_time: Any = None
    instances = [
        InstanceModel(InstanceSpec(f"{role}-{index}", role, KvConfig(64)), no_step_time, (Gpu(node, index),))
        for node, (role, count) in enumerate(((Role.PREFILL, num_prefill), (Role.DECODE, num_decode)))
        for index in range(count)
    ]
    cluster = ClusterSpec("cpu", 2, max(num_prefill, num_decode), 1e9, 10_000.0)
    model = ClusterModel(tuple(instances), cluster, KvGeometry(1, 1, 100))
    return Pulls(Delays(pull_latency=0.0), PullNetwork(model))


def start(pulls: Pulls, now: float, pull_id: int, num_blocks: int, source: Any = READY, **of: str) -> None:
    blocks = tuple(range(num_blocks))
    ready_step = next(iter(source.step_ends), 0)
    num_ready = 0 if source.step_ends else num_blocks
    command = Migrate(
        pull_id, (f"r{pull_id}", 0), of.get("source_id", "prefill-0"), blocks, blocks, num_ready, ready_step, 1e9
    )
    pulls.start(now, of.get("puller", "decode-0"), command, source)


def ends(pulls: Pulls) -> dict[int, float]:
    """When each pull ends."""
    found = {}
    while (now := pulls.next_time) < float("inf"):
        found.update({event.pull_id: now for _, event in pulls.advance(now)})
    return found


def test_between_two_instances_the_older_pull_ends_as_if_it_were_alone() -> None:
    network = pulls()
    start(network, 0.0, 1, 10)
    start(network, 0.0, 2, 10)
    start(network, 0.0, 3, 5)
    assert ends(network) == pytest.approx({1: 1.6, 2: 3.2, 3: 4.0})


def test_pulls_of_several_pairs_share_the_link() -> None:
    network = pulls(num_decode=2)
    start(network, 0.0, 1, 10)
    start(network, 0.0, 2, 10, puller="decode-1")
    assert ends(network) == pytest.approx({1: 3.2, 2: 3.2})


def test_a_pull_that_waits_for_its_step_lets_younger_ones_flow() -> None:
    network = pulls()
    slow: Any = SimpleNamespace(step_starts={7: 0.0}, step_ends={7: 8.0})
    start(network, 0.0, 1, 10, slow)
    start(network, 0.0, 2, 10)
    # The first one's layers come by quarters, every 2 s, and take 0.4 s.
    found = ends(network)
    assert found[2] == pytest.approx(1.6)
    assert found[1] == pytest.approx(8.4)


def test_what_is_given_up_leaves_its_turn_to_the_next() -> None:
    network = pulls()
    start(network, 0.0, 1, 10)
    start(network, 0.0, 2, 10)
    start(network, 0.0, 3, 10)
    assert network.advance(0.0) == []
    assert network.cancel(0.8, "decode-0", 2)
    assert network.cancel(0.8, "decode-0", 1)
    assert ends(network) == pytest.approx({3: 2.4})
    assert network.lose(3.0, "prefill-0") == []
