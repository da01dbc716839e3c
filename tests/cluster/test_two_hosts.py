"""Prefill and decode on hosts that share nothing but a cable: network namespaces, each a node of one Ray cluster.

Run with ``pytest tests/cluster/test_two_hosts.py -m slow`` as root, or by anyone within ``unshare -Urn``.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import Namespaces, RayHosts, instances, why_no_namespaces
from .serving import Server
from .test_two_nodes import NUM_TOKENS, PROMPT, config, generated, wait_for, wait_idle

pytestmark = pytest.mark.slow

APART = config("auto", [[[0, 0], [0, 1]]], [[[1, 0]]])
"""Two shards prefill on one host, one rank decodes on the other."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Namespaces]:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with Namespaces() as namespaces:
        yield namespaces


@pytest.fixture(scope="module")
def nodes(hosts: Namespaces) -> Iterator[RayHosts]:
    with RayHosts(hosts, 4, 2) as nodes:
        yield nodes


BESIDE = config("auto", [[[0, 0], [1, 0]]], [[[0, 1], [1, 1]]], 2, 2)
"""Both instances have a stage on each host."""


def start(directory: Path, hosts: Namespaces, nodes: RayHosts, text: str, *flags: str) -> Server:
    """A server on the first host, which answers there alone."""
    (directory / "config.yaml").write_text(text)
    flags = ("--config", str(directory / "config.yaml"), "--ray-address", nodes.address, *flags)
    return Server(*flags, log=directory / "log", environment=nodes.environment, prefix=hosts.enter(0))


def refusal(server: Server) -> str:
    """What a server that does not start says last."""
    try:
        assert server.process.wait(90) == 1, server.log.read_text()
        return next(line for line in server.log.read_text().splitlines() if line.startswith("Error: "))
    finally:
        server.kill()


@pytest.mark.parametrize("text", [APART, BESIDE])
def test_tokens_are_those_of_generate(tmp_path: Path, hosts: Namespaces, nodes: RayHosts, text: str) -> None:
    server = start(tmp_path, hosts, nodes, text)
    try:
        server.wait_ready()
        tokens = hosts.call(0, lambda: list(server.token_ids(PROMPT, NUM_TOKENS)))
        assert tokens == generated()
        hosts.call(0, lambda: wait_idle(server))
        server.send(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert instances(nodes.directory) == set()
    finally:
        server.kill()


def test_shared_memory_between_hosts_is_refused_with_what_to_do(
    tmp_path: Path, hosts: Namespaces, nodes: RayHosts
) -> None:
    said = refusal(start(tmp_path, hosts, nodes, APART, "--kv-transport", "shm"))
    assert "decode on node 1, prefill on node 0" in said
    assert "--kv-transport auto" in said


@pytest.mark.parametrize(("text", "number"), [(APART, 0), (BESIDE, 0), (BESIDE, 1)])
def test_an_interface_that_a_node_lacks_is_named(
    tmp_path: Path, hosts: Namespaces, nodes: RayHosts, text: str, number: int
) -> None:
    """Each host has one end of the cable; the node of rank 0 lacks the other's, or that of another rank does."""
    said = refusal(start(tmp_path, hosts, nodes, text, "--kv-interface", f"cable{1 - number}"))
    assert f"has no network interface cable{1 - number}: it has lo (127.0.0.1" in said
    assert f"cable{number} (10.213.0.{number + 1})" in said
    assert instances(nodes.directory) == set()


def test_a_port_that_cannot_be_reached_is_said_within_seconds(
    tmp_path: Path, hosts: Namespaces, nodes: RayHosts
) -> None:
    """Both hosts have addresses in a network that no cable carries."""
    for number in range(2):
        mine, theirs, nobody = f"10.214.{number}.1", f"10.214.{1 - number}.1", f"10.213.0.{9 + number}"
        hosts.run(number, "ip", "address", "add", f"{mine}/32", "dev", "lo")
        # Packets to it leave and are lost, as behind a firewall that drops them.
        cable = ("dev", f"cable{number}")
        hosts.run(number, "ip", "route", "add", f"{theirs}/32", "via", nobody, *cable, "onlink")
        hosts.run(number, "ip", "neighbour", "add", nobody, "lladdr", "02:00:00:00:00:09", *cable)
    began = time.monotonic()
    said = refusal(start(tmp_path, hosts, nodes, APART, "--kv-interface", "10.214.0.0/16"))
    assert "decode-0 cannot pull KV from prefill-0" in said
    assert "10.214.0.1" in said
    assert "timed out" in said
    assert "--kv-interface" in said
    assert time.monotonic() - began < 60
    assert instances(nodes.directory) == set()


def test_a_host_that_dies_is_said_and_ends_no_other(tmp_path: Path, hosts: Namespaces, nodes: RayHosts) -> None:
    server = start(tmp_path, hosts, nodes, APART)
    try:
        server.wait_ready()
        assert len(hosts.call(0, lambda: list(server.token_ids(PROMPT, 10)))) == 10
        nodes.kill(1)
        wait_for(server, "decode-0 died")
        body = {"prompt": PROMPT, "max_tokens": 4}
        status, answer = hosts.call(0, lambda: server.call("/v1/completions", body))
        assert status == 503
        assert "decode" in answer["error"]["message"]
        assert len(instances(nodes.directory)) == 1
        server.send(signal.SIGTERM)
        assert server.process.wait(60) == 0
    finally:
        server.kill()
