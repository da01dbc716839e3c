"""Prefill on one Ray node, decode on another, KV over TCP between them: from HTTP to token, and through a node's death.

The nodes are Ray's own, on this machine, each at an address of its own. ``test_two_hosts.py`` has them in network
namespaces.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.oracle import demo_model, generate

from .hosts import RayNodes
from .serving import Server

NUM_TOKENS = 150
PROMPT = [(7 * i + 11) % 3000 + 3 for i in range(90)]
CONFIG = """
placement:
  prefill: {{instances: 1, tp: {prefill_tp}, pp: {prefill_pp}, gpus: {prefill}}}
  decode: {{instances: {num_decodes}, tp: {decode_tp}, pp: {decode_pp}, gpus: {decode}}}
cluster: {{gpu: cpu, nodes: 2, gpus_per_node: 4}}
engine: {{dtype: float32, kv_tokens: 1024, kv_transport: {transport}, threads: 1}}
"""


def config(
    transport: str,
    prefill: list[list[list[int]]],
    decode: list[list[list[int]]],
    prefill_pp: int = 1,
    decode_pp: int = 1,
) -> str:
    """A configuration of one prefill instance; ``prefill`` and ``decode`` list each instance's [node, slot]s."""
    return CONFIG.format(
        transport=transport,
        prefill_tp=len(prefill[0]) // prefill_pp,
        prefill_pp=prefill_pp,
        prefill=prefill,
        num_decodes=len(decode),
        decode_tp=len(decode[0]) // decode_pp,
        decode_pp=decode_pp,
        decode=decode,
    )


def generated() -> list[int]:
    """What must be said to PROMPT."""
    return generate(demo_model(), PROMPT, NUM_TOKENS)


@contextmanager
def serving(directory: Path, nodes: RayNodes, text: str) -> Iterator[Server]:
    """A server on ``nodes``, which has to end by itself and to leave no instance behind."""
    (directory / "config.yaml").write_text(text)
    flags = ("--config", str(directory / "config.yaml"), "--ray-address", nodes.address)
    server = Server(*flags, log=directory / "log", environment=nodes.environment)
    try:
        server.wait_ready()
        yield server
        server.send(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()
        assert nodes.instances() | nodes.rank_hosts() == set()
    finally:
        server.kill()


def migrations(server: Server) -> dict[str, float]:
    """KV pulls that have ended, by instance."""
    return metric(server, "distserve:kv_migrations_total")


def metric(server: Server, name: str) -> dict[str, float]:
    """A metric's value by instance."""
    with server.open("/metrics") as response:
        lines = response.read().decode().splitlines()
    found = (re.match(rf'{name}{{.*instance="([^"]+)".*}} (.*)', line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def wait_idle(server: Server) -> None:
    """Until every instance reports that all its blocks are free."""
    end = time.monotonic() + 20
    while any(metric(server, "distserve:kv_cache_usage_perc").values()):
        assert time.monotonic() < end, metric(server, "distserve:kv_cache_usage_perc")
        time.sleep(0.1)


def wait_for(server: Server, text: str, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while text not in server.log.read_text():
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def stream_all(server: Server, count: int, when_begun: threading.Barrier | None = None) -> list[list[int]]:
    """The same prompt, ``count`` times at once; all meet at the barrier after a few tokens."""
    answers: list[list[int]] = [[] for _ in range(count)]

    def read(answer: list[int]) -> None:
        for token in server.token_ids(PROMPT, NUM_TOKENS):
            answer.append(token)
            if when_begun is not None and len(answer) == 5:
                when_begun.wait(60)

    readers = [threading.Thread(target=read, args=(answer,)) for answer in answers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    return answers


def stream_through_a_loss(server: Server, nodes: RayNodes) -> list[list[int]]:
    """Four answers to the same prompt; the second node dies when all have begun."""
    begun = threading.Barrier(5)

    def kill() -> None:
        begun.wait(60)
        nodes.kill(1)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = stream_all(server, 4, begun)
    killer.join()
    return answers


def test_kv_crosses_nodes_and_a_node_that_dies_costs_no_tokens(tmp_path: Path) -> None:
    """Two shards prefill on the first node; one decode instance is there, the other on the second node.

    The near one is preferred until several requests fill a good part of its memory.
    """
    expected = generated()
    text = config("tcp", [[[0, 0], [0, 1]]], [[[0, 2]], [[1, 0]]])
    with RayNodes(4, 2) as nodes, serving(tmp_path, nodes, text) as server:
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == expected
        assert stream_all(server, 4) == [expected] * 4
        assert len(nodes.instances()) == 3
        wait_idle(server)
        assert set(migrations(server)) == {"prefill-0", "decode-0", "decode-1"}
        assert all(migrations(server)[name] > 0 for name in ("decode-0", "decode-1"))
        # Whatever the second node decoded goes on with the first one's decode instance.
        assert stream_through_a_loss(server, nodes) == [expected] * 4
        wait_for(server, "decode-1 is not replaced: a node of it has left the Ray cluster")
        assert len(nodes.instances()) == 2
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == expected
        wait_idle(server)
        status, health = server.call("/health")
        assert (status, health["pools"]) == (200, {"prefill": {"instances": 1}, "decode": {"instances": 1}})


def test_the_routers_node_may_die(tmp_path: Path) -> None:
    """The plan's first node, which the router is on, is the smaller one of the cluster."""
    expected = generated()
    text = """
placement: {mixed: {instances: 2, gpus: [[[0, 0]], [[1, 0]]]}}
cluster: {gpu: cpu, nodes: 2, gpus_per_node: 4}
engine: {dtype: float32, kv_tokens: 1024, threads: 1}
"""
    with RayNodes(4, 2) as nodes, serving(tmp_path, nodes, text) as server:
        assert stream_through_a_loss(server, nodes) == [expected] * 4
        wait_for(server, "the router died; starting another")
        wait_for(server, "mixed-0 is not replaced: a node of it has left the Ray cluster")
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == expected
        wait_idle(server)


def test_stages_on_two_nodes_side_by_side_and_the_loss_of_one_is_the_instances(tmp_path: Path) -> None:
    """Low affinity (DistServe's Algorithm 2): a stage of both instances on each node, so KV stays within nodes."""
    expected = generated()
    text = config("auto", [[[0, 0], [1, 0]]], [[[0, 1], [1, 1]]], 2, 2)
    with RayNodes(4, 4) as nodes, serving(tmp_path, nodes, text) as server:
        assert stream_all(server, 3) == [expected] * 3
        assert migrations(server)["decode-0"] == 3
        wait_idle(server)
        # One process on the second node for each instance, with a nursery, with a rank.
        hosts = nodes.rank_hosts()
        assert len(hosts) == 2
        (nursery,) = children_of(hosts.pop())
        (rank,) = children_of(nursery)
        os.kill(rank, signal.SIGKILL)
        wait_for(server, "is serving")
        assert len(nodes.rank_hosts()) == 2
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == expected
        wait_idle(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "prefill", "decode"),
    [
        ("tcp", [[[0, 0]]], [[[1, 0]]]),
        ("tcp", [[[0, 0]]], [[[1, 0], [1, 1]]]),
        ("tcp", [[[0, 0], [0, 1]]], [[[1, 0], [1, 1]]]),
        # Two nodes of one machine: shared memory reaches, and is what is used.
        ("auto", [[[0, 0]]], [[[1, 0]]]),
    ],
)
def test_equal_and_unequal_shapes_give_the_tokens_of_generate(
    tmp_path: Path, transport: str, prefill: list[list[list[int]]], decode: list[list[list[int]]]
) -> None:
    with RayNodes(4, 4) as nodes, serving(tmp_path, nodes, config(transport, prefill, decode)) as server:
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == generated()
        wait_idle(server)


@pytest.mark.slow
def test_a_node_that_dies_takes_the_instance_that_has_a_stage_there(tmp_path: Path) -> None:
    expected = generated()
    text = config("auto", [[[0, 0]]], [[[0, 1], [0, 2]], [[0, 3], [1, 0]]], 1, 2)
    with RayNodes(4, 2) as nodes, serving(tmp_path, nodes, text) as server:
        assert stream_through_a_loss(server, nodes) == [expected] * 4
        wait_for(server, "decode-1 is not replaced: a node of it has left the Ray cluster")
        assert list(server.token_ids(PROMPT, NUM_TOKENS)) == expected
        wait_idle(server)


@pytest.mark.slow
def test_without_its_only_decode_node_a_request_is_told_so(tmp_path: Path) -> None:
    text = config("tcp", [[[0, 0]]], [[[1, 0]]])
    # Of two nodes with a rank each the plan's last goes to the larger one.
    with RayNodes(2, 4) as nodes, serving(tmp_path, nodes, text) as server:
        assert len(list(server.token_ids(PROMPT, NUM_TOKENS))) == NUM_TOKENS
        nodes.kill(1)
        wait_for(server, "decode-0 died")
        status, answer = server.call("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
        assert status == 503
        assert "decode" in answer["error"]["message"]
