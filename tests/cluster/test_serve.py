"""The real thing: ``distserve serve`` on a local Ray cluster, through deaths of every kind, and what it leaves behind.

One server lives through most tests, in the order written; a second one is killed.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distserve.cluster.parts import OWNER
from distserve.cluster.replay import read_log, replay
from distserve.core.events import InstanceUp, Machine
from distserve.core.instance_machine import scheduler_for
from distserve.core.owner import Owner
from distserve.core.router import Router, RouterConfig

from .serving import Server

PROMPT = list(range(30, 70))
NUM_TOKENS = 200
WHOLE = {"prefill": {"instances": 1}, "decode": {"instances": 2}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("serve")
    flags = ("--prefill", "1", "--decode", "2", "--drain-timeout", "200", "--event-log", str(directory / "events"))
    server = Server(*flags, log=directory / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


@pytest.fixture(scope="module")
def tokens(server: Server) -> list[int]:
    """What the model says to PROMPT when nothing goes wrong."""
    tokens = list(server.token_ids(PROMPT, NUM_TOKENS))
    assert len(tokens) == NUM_TOKENS
    return tokens


def wait_whole(server: Server, num_replaced: int) -> None:
    """Until ``num_replaced`` replacements serve and the API has heard of a full house."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        pools = server.call("/health")[1]["pools"]
        if pools == WHOLE and server.log.read_text().count("is serving") == num_replaced:
            return
        time.sleep(0.1)
    raise AssertionError(server.log.read_text())


def cpus_of(pid: int) -> set[int]:
    """CPUs that any thread of the process may run on."""
    return set().union(*(os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()))


def wait_until_removed(path: Path) -> bool:
    end = time.monotonic() + 10
    while path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not path.exists()


def test_the_start_ends_with_one_line_of_what_is_served(server: Server) -> None:
    lines = server.log.read_text().splitlines()
    assert lines[-1].startswith(f"Serving distserve-demo at {server.url}/v1 on 1 prefill x ")
    assert "2 decode x " in lines[-1]
    assert lines[-1].endswith("tokens of KV")
    if len(os.sched_getaffinity(0)) < 3:
        assert any("share" in line and "CPUs" in line for line in lines)
    assert any("loading the model on prefill-0, decode-0, decode-1" in line for line in lines)


def test_both_pools_serve(server: Server, tokens: list[int]) -> None:
    assert server.call("/health") == (
        200,
        {"status": "ok", "pools": {"prefill": {"instances": 1}, "decode": {"instances": 2}}},
    )
    assert list(server.token_ids(PROMPT, NUM_TOKENS)) == tokens


def test_our_own_sockets_listen_on_loopback_only(server: Server) -> None:
    # Ray's own listen everywhere (over IPv6 sockets), which is why its cluster has a secret token.
    parts = [server.process.pid, *server.instances(), *server.routers()]
    links = [link for pid in parts for link in Path(f"/proc/{pid}/fd").iterdir()]
    # A descriptor may be closed between the two looks.
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    inodes = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]
    assert len(listening) >= len(parts)
    assert {address.partition(":")[0] for address in listening} == {"0100007F"}


def test_the_local_ray_cluster_lets_no_stranger_in(server: Server) -> None:
    (gcs,) = [pid for pid, title in server.processes().items() if "gcs_server" in title]
    environment = (Path(f"/proc/{gcs}/environ")).read_bytes().split(b"\0")
    assert b"RAY_AUTH_MODE=token" in environment


def test_an_instance_that_is_killed_costs_no_tokens_and_is_replaced(server: Server, tokens: list[int]) -> None:
    for number, victim in enumerate(server.instances()):
        stream = server.token_ids(PROMPT, NUM_TOKENS)
        # By then the KV has moved: the loss of the only prefill instance concerns new requests alone.
        received = [next(stream) for _ in range(20)]
        os.kill(victim, signal.SIGKILL)
        received += stream
        assert received == tokens
        wait_whole(server, number + 1)
        assert victim not in server.instances()
    assert list(server.token_ids(PROMPT, NUM_TOKENS)) == tokens


def test_a_router_that_is_killed_is_replaced(server: Server, tokens: list[int]) -> None:
    stream = server.token_ids(PROMPT, NUM_TOKENS)
    received = [next(stream)]
    (victim,) = server.routers()
    os.kill(victim, signal.SIGKILL)
    received += stream
    assert received == tokens
    end = time.monotonic() + 60
    while victim in server.routers() or not server.routers() or server.call("/health")[0] != 200:
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.1)
    assert list(server.token_ids(PROMPT, NUM_TOKENS)) == tokens


def test_a_port_in_use_is_said_before_anything_starts(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    second = Server("--port", port, log=tmp_path / "log")
    assert second.process.wait(30) == 1
    assert f"port {port}: Address already in use" in second.log.read_text()
    assert "Ray" not in second.log.read_text()


def test_stopping_finishes_what_runs_refuses_what_is_new_and_leaves_nothing(server: Server, tokens: list[int]) -> None:
    # First all that runs is found, then it must be gone.
    assert len(server.processes()) > 5
    session, segments = Path(str(server.session)), server.shared_memory()
    received: list[int] = []
    started = threading.Event()

    def read() -> None:
        for token in server.token_ids(PROMPT, NUM_TOKENS + 40):
            received.append(token)
            started.set()

    def flood() -> None:
        # Four times as long as what the reader waits for.
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = {"prompt": [PROMPT] * 24, "max_tokens": 4 * (NUM_TOKENS + 40), "ignore_eos": True}
            server.call("/v1/completions", body)

    reader, flooder = threading.Thread(target=read), threading.Thread(target=flood)
    reader.start()
    assert started.wait(30)
    flooder.start()
    server.send(signal.SIGTERM)
    while "interrupt again to stop now" not in server.log.read_text():
        assert server.process.poll() is None
        time.sleep(0.001)
    status, answer = server.call("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
    assert status == 503
    assert "shutting down" in answer["error"]["message"]
    reader.join(150)
    assert len(received) == NUM_TOKENS + 40
    assert received[:NUM_TOKENS] == tokens
    # Ctrl-C on a terminal goes to the whole process group; this is the second signal, so it ends at once.
    server.send_to_group(signal.SIGINT)
    assert server.process.wait(15) == 0
    flooder.join(15)
    assert not flooder.is_alive()
    assert server.processes() == {}
    assert not session.exists()
    assert not any(segment.exists() for segment in segments)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))


def test_the_logs_of_all_parts_replay_to_what_they_commanded(server: Server) -> None:
    events = server.log.parent / "events"
    logs = {path.stem: path for path in events.iterdir()}
    # Three instances and the router, each with a successor, and the API.
    assert len(logs) == 9
    up = [event for name in ("router", "router-2") for _, event, _ in read_log(logs[name])]
    specs = {event.spec.instance_id: event.spec for event in up if isinstance(event, InstanceUp)}
    assert len(specs) == 6
    machines: dict[str, Machine] = {name: scheduler_for(spec) for name, spec in specs.items()}
    machines |= {"router": Router(), "router-2": Router(), OWNER: Owner(OWNER)}
    for name, machine in machines.items():
        steps = list(replay(logs[name], machine))
        assert len(steps) > 3
        # Those who were killed may have left their last record unfinished.
        for _, event, live, again in steps[:-1]:
            assert live == again, (name, event)


def test_instances_have_cpus_of_their_own_and_a_killed_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    server = Server(log=tmp_path / "log")
    try:
        server.wait_ready()
        session, segments = Path(str(server.session)), server.shared_memory()
        if len(os.sched_getaffinity(0)) > 1:
            cores = [cpus_of(pid) for pid in server.instances()]
            assert not cores[0] & cores[1]
        stream = server.token_ids(PROMPT, NUM_TOKENS)
        next(stream)
        server.send(signal.SIGKILL)
        server.process.wait()
        assert server.wait_gone() == {}
        assert wait_until_removed(session)
        assert not any(segment.exists() for segment in segments)
    finally:
        server.kill()


def test_an_interrupt_while_starting_leaves_nothing(tmp_path: Path) -> None:
    server = Server(log=tmp_path / "log")
    try:
        end = time.monotonic() + 60
        while "loading the model" not in server.log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert len(server.processes()) > 5
        segments = server.shared_memory()
        server.send_to_group(signal.SIGINT)
        assert server.process.wait(30) == 130
        assert server.wait_gone() == {}
        assert "Traceback" not in server.log.read_text()
        assert not any(segment.exists() for segment in segments)
    finally:
        server.kill()


@pytest.mark.slow
def test_instances_that_hang_are_given_up_and_replaced_once_they_wake(tmp_path: Path) -> None:
    server = Server(log=tmp_path / "log")
    try:
        server.wait_ready()
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with server.open("/v1/completions", body) as response:
            expected = json.load(response)["choices"][0]["token_ids"]
        hung = server.instances()
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        waker = threading.Timer(RouterConfig().silence + 5, lambda: [os.kill(pid, signal.SIGCONT) for pid in hung])
        waker.start()
        with server.open("/v1/completions", body, timeout=150) as response:
            assert json.load(response)["choices"][0]["token_ids"] == expected
        waker.join()
        assert not set(hung) & set(server.instances())
    finally:
        server.kill()
        assert server.wait_gone() == {}
