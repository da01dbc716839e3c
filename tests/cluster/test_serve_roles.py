"""Roles change on a real cluster, by an operator's command: processes stay, tokens stay, deaths do not undo it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from .serving import Server

PROMPT = list(range(30, 70))
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("serve")
    server = Server("--prefill", "1", "--decode", "2", "--kv-tokens", "20000", log=directory / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


def role(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distserve.cli", "role", *arguments, "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def pools(server: Server) -> dict[str, int]:
    return {name: pool["instances"] for name, pool in server.call("/health")[1]["pools"].items()}


def wait_for_pools(server: Server, expected: dict[str, int]) -> None:
    end = time.monotonic() + 90
    while server.call("/health")[0] != 200 or pools(server) != expected:
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.1)


@pytest.fixture
def changed(server: Server) -> None:
    """decode-1 is a prefill instance, whichever tests ran before."""
    if pools(server)["prefill"] == 1:
        assert role(server, "decode-1", "prefill").returncode == 0


def test_an_instance_changes_under_load_by_command_and_serves_on(server: Server) -> None:
    tokens = list(server.token_ids(PROMPT, NUM_TOKENS))
    before = set(server.instances())
    streams = [server.token_ids(PROMPT, NUM_TOKENS) for _ in range(3)]
    received = [[next(stream)] for stream in streams]
    said = role(server, "decode-1", "prefill")
    assert said.returncode == 0, said.stderr
    assert "decode-1 is a prefill instance after" in said.stdout
    for got, stream in zip(received, streams, strict=True):
        assert [*got, *stream] == tokens
    assert pools(server) == {"prefill": 2, "decode": 1}
    assert set(server.instances()) == before, "no process was started or ended"
    # The first in line of two idle prefill instances is decode-1, by name: what it computes is pulled from there.
    assert list(server.token_ids(PROMPT, NUM_TOKENS)) == tokens
    listed = role(server)
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [
        ["decode-0", "decode"],
        ["decode-1", "prefill"],
        ["prefill-0", "prefill"],
    ]
    metrics = server.open("/metrics").read().decode()
    assert 'distserve:role_changes_total{instance="decode-1",pool="prefill"} 1.0' in metrics


@pytest.mark.usefixtures("changed")
def test_what_cannot_be_is_refused(server: Server) -> None:
    for arguments, words in (
        (("decode-0", "prefill"), "last decode instance"),
        (("decode-1", "prefill"), "a prefill instance already"),
        (("decode-7", "prefill"), "no instance is called decode-7"),
    ):
        said = role(server, *arguments)
        assert said.returncode == 1
        assert words in said.stderr
    assert pools(server) == {"prefill": 2, "decode": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("changed")
def test_a_replacement_has_the_role_that_its_predecessor_was_given(server: Server) -> None:
    tokens = list(server.token_ids(PROMPT, 20))
    (router,) = server.routers()
    os.kill(router, signal.SIGKILL)
    end = time.monotonic() + 60
    while router in server.routers() or not server.routers():
        assert time.monotonic() < end
        time.sleep(0.1)
    wait_for_pools(server, {"prefill": 2, "decode": 1})
    for victim in server.instances():
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 90
        while victim in server.instances() or len(server.instances()) < 3:
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.1)
        wait_for_pools(server, {"prefill": 2, "decode": 1})
    assert list(server.token_ids(PROMPT, 20)) == tokens
