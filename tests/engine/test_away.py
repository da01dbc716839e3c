"""Ranks on another node than rank 0's: they come over TCP, say what all say, and end with whoever is lost.

The other node is an address of its own on this machine: nothing of it is rank 0's child.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError, InstanceError
from distserve.engine.group.away import Muster, join
from distserve.engine.group.driver import RankGroup
from distserve.engine.group.processes import NodeShare
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import Harness, make_request
from tests.engine.test_group import KV, children_of

SECRET = b"of this instance"
HERE, THERE, ALSO_THERE = "127.0.0.5", "127.0.0.6", "127.0.0.7"


class Apart:
    """An instance with ``away`` of its ranks on nodes of their own, each with the nursery that starts them."""

    def __init__(self, path: Path, tp: int, pp: int, away: list[NodeShare], **more: object) -> None:
        self.told: list[Exception] = []
        self.muster = Muster(HERE, SECRET, frozenset(rank for share in away for rank in share.ranks))
        self.nurseries = [join(self.muster.address, SECRET, share) for share in away]
        self.group = RankGroup(
            path,
            parallel=ParallelConfig(tp, pp),
            kv=KV,
            timeout=120.0,
            away=self.muster.crews(30.0),
            host=self.muster.host,
            on_lost=self.told.append,
            **more,
        )

    def close(self) -> None:
        self.group.shutdown()
        for nursery in self.nurseries:
            # By itself: the connection to rank 0 is gone.
            assert nursery.wait(20) == 0
            assert nursery.stdin is not None
            nursery.stdin.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Apart]]:
    """Starts instances, and ends them after the test."""
    started: list[Apart] = []

    def make(*arguments: object, **more: object) -> Apart:
        started.append(Apart(*arguments, **more))
        return started[-1]

    yield make
    for apart in started:
        apart.close()


@pytest.mark.parametrize(
    ("tp", "pp", "away"),
    [
        (1, 2, [NodeShare((1,), THERE)]),
        (2, 2, [NodeShare((2, 3), THERE)]),
        pytest.param(1, 3, [NodeShare((2,), THERE), NodeShare((1,), ALSO_THERE)], marks=pytest.mark.slow),
        # No plan splits a stage, whose shards would wait for the network twice a layer; the engine does not mind.
        pytest.param(2, 2, [NodeShare((1, 3), THERE)], marks=pytest.mark.slow),
    ],
)
def test_texts_are_those_of_generate(
    llama: Served, start: Callable[..., Apart], tp: int, pp: int, away: list[NodeShare]
) -> None:
    apart = start(llama.path, tp, pp, away)
    harness = Harness(apart.group)
    for chunk in (None, 7):
        for prompt, expected in zip(llama.prompts, llama.expected, strict=True):
            assert harness.generate(make_request(prompt), NUM_TOKENS, chunk).output == expected


def test_each_rank_has_cpus_of_its_own_node_and_a_killed_one_is_named(
    llama: Served, start: Callable[..., Apart]
) -> None:
    last = max(os.sched_getaffinity(0))
    apart = start(llama.path, 1, 2, [NodeShare((1,), THERE, cores=(last,))])
    (pid,) = children_of(apart.nurseries[0].pid)
    assert os.sched_getaffinity(pid) == {last}
    harness = Harness(apart.group)
    track = harness.open(make_request(llama.prompts[0]))
    harness.prefill(track)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(InstanceError, match="rank 1 was killed by SIGKILL"):
        harness.decode([track], 50)
    assert len(apart.told) == 1


@pytest.mark.parametrize("how", ["its starter is gone", "it is killed"])
def test_without_its_nursery_a_rank_ends_and_the_instance_with_it(
    llama: Served, start: Callable[..., Apart], how: str
) -> None:
    apart = start(llama.path, 1, 2, [NodeShare((1,), THERE)])
    (nursery,) = apart.nurseries
    (pid,) = children_of(nursery.pid)
    if how == "it is killed":
        nursery.kill()
    else:
        assert nursery.stdin is not None
        nursery.stdin.close()
    wait_until(lambda: bool(apart.told))
    assert "is gone" in str(apart.told[0]) or "rank 1 was killed" in str(apart.told[0])
    wait_until(lambda: not is_running(pid))
    assert nursery.wait(10) in {0, -signal.SIGKILL}
    if nursery.stdin is not None:
        nursery.stdin.close()
    apart.nurseries.clear()


def test_a_share_without_room_names_the_ranks_of_the_node(llama: Served) -> None:
    muster = Muster(HERE, SECRET, frozenset({1}))
    nursery = join(muster.address, SECRET, NodeShare((1,), THERE))
    away = muster.crews(30.0)
    with pytest.raises(ConfigError, match=r"tp 1 and pp 2, with 1 of its ranks here, needs .* are missing"):
        RankGroup(llama.path, parallel=ParallelConfig(1, 2), kv=KvConfig(10**9, 16), away=away, host=HERE)
    assert nursery.wait(20) == 0, "nobody is there any more"
    end(nursery)


class Refusing:
    """Memory that a rank does not get."""

    def __init__(self, *_: object) -> None:
        raise ConfigError("no memory on this node")


def test_a_mistake_on_the_other_node_is_said_at_once(llama: Served) -> None:
    """Rank 0 waits for all to meet when another rank has found one."""
    muster = Muster(HERE, SECRET, frozenset({1}))
    nursery = join(muster.address, SECRET, NodeShare((1,), THERE))
    away = muster.crews(30.0)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="no memory on this node"):
        RankGroup(
            llama.path,
            parallel=ParallelConfig(1, 2),
            kv=KV,
            away=away,
            host=HERE,
            memory=f"{__name__}:Refusing",
        )
    assert time.monotonic() - begin < 40
    assert nursery.wait(20) == 0
    end(nursery)


def test_strangers_are_not_taken_on_and_hold_nobody_up() -> None:
    muster = Muster(HERE, SECRET, frozenset({1}))
    host, _, port = muster.address.rpartition(":")
    # One says nothing, one knows nothing.
    with socket.create_connection((host, int(port))), pytest.raises(InstanceError, match="cannot be reached"):
        join(muster.address, b"of another instance", NodeShare((1,), THERE))
    nursery = join(muster.address, SECRET, NodeShare((1,), THERE))
    (crew,) = muster.crews(30.0)
    assert crew.share.ranks == (1,)
    with pytest.raises(InstanceError, match=f"cannot be reached at {muster.address}: .*refused"):
        join(muster.address, SECRET, NodeShare((1,), THERE))
    end(nursery)


def test_who_does_not_come_is_named() -> None:
    muster = Muster(HERE, SECRET, frozenset({1, 2, 3}))
    nursery = join(muster.address, SECRET, NodeShare((2,), THERE))
    with pytest.raises(InstanceError, match=r"the ranks 1, 3, on other nodes, did not come to rank 0 within 0\.5 s"):
        muster.crews(0.5)
    end(nursery)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and awaits its parent's notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def end(nursery: "subprocess.Popen[bytes]") -> None:
    """What the starter of a nursery that is of no use does."""
    assert nursery.stdin is not None
    nursery.stdin.close()
    nursery.kill()
    nursery.wait(10)
