"""Peers that do not speak the protocol, or not this version of it."""

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from distserve.core.errors import TransferError
from distserve.transfer import greeting, handshake
from distserve.transfer.shm import ShmTransport
from tests.transfer.pools import LAYOUT, SECRET, Ended, migrate


@pytest.fixture
def transport():
    made = ShmTransport(LAYOUT, secret=SECRET, clock=time.time)
    yield made
    made.close()


def exchange(address: str, packet: bytes) -> bytes:
    """Answer a server's challenge with ``packet`` and return what it says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(10)
        client.connect("\0" + address)
        assert json.loads(client.recv(4096)).keys() == {"protocol", "nonce"}
        client.send(packet)
        return client.recv(4096)


def test_an_older_client_is_told_both_versions(transport):
    answer = exchange(transport.address, json.dumps({"protocol": 0}).encode())
    assert json.loads(answer) == {"error": f"KV transfer protocol {greeting.PROTOCOL} there, 0 here"}


@pytest.mark.parametrize(
    "packet", [b"GET / HTTP/1.1", b"[" * 4000, b"[]", json.dumps({"protocol": 1, "proof": "\ud800é"}).encode(), b"\xff"]
)
def test_nonsense_gets_nothing_and_harms_nothing(transport, packet):
    answer = exchange(transport.address, packet)
    assert answer == b"" or "secrets differ" in json.loads(answer)["error"]
    ended = Ended()
    transport.connect("source", transport.address)
    transport.pull(migrate(1, (1,), (2,)), ended)
    assert ended.next().ok


def test_a_failed_handshake_leaves_no_descriptor(transport):
    stranger = ShmTransport(LAYOUT, secret=b"other", clock=time.time)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(TransferError, match="the secrets differ"):
            stranger.connect("source", transport.address)
    deadline = time.monotonic() + 10
    while len(list(Path("/proc/self/fd").iterdir())) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    stranger.close()


@pytest.mark.parametrize(
    ("challenge", "says"),
    [
        (b'{"protocol": 7, "nonce": "0"}', "protocol 7 there, 1 here"),
        (b"220 mail.example.org ESMTP", "does not speak"),
        (None, "closed the connection"),
    ],
)
def test_a_server_that_is_something_else_is_named(transport, challenge, says):
    server, address = handshake.listen()

    def answer():
        connection, _ = server.accept()
        with connection:
            if challenge is not None:
                connection.send(challenge)
                connection.recv(4096)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(TransferError, match=says):
        transport.connect("source", address)
    thread.join()
    server.close()


def test_a_server_that_knows_no_secret_is_not_read(transport):
    """Whoever took an address over cannot make a rank read its memory."""
    server, address = handshake.listen()

    def answer():
        connection, _ = server.accept()
        with connection, Path("/dev/null").open() as null:
            connection.send(json.dumps({"protocol": greeting.PROTOCOL, "nonce": "0"}).encode())
            connection.recv(4096)
            packet = json.dumps({"proof": "0" * 64, "generation": 1}).encode()
            socket.send_fds(connection, [packet], [null.fileno(), null.fileno()])
            connection.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(TransferError, match="does not know the secret"):
        transport.connect("source", address)
    thread.join()
    server.close()
