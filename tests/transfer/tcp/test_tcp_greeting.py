"""Who meets over TCP: peers of one cluster and of one layout; strangers of any kind learn and harm nothing."""

import contextlib
import json
import socket
import struct
import time
from dataclasses import replace

import pytest

from distserve.core.errors import TransferError
from distserve.transfer import greeting, tcp, tcp_wire
from distserve.transfer.tcp import TcpTransport
from tests.transfer.pools import LAYOUT, SECRET, Ended, migrate
from tests.transfer.tcp.ends import make


def test_a_peer_that_never_answers_the_greeting_is_given_up(fake, sink, monkeypatch):
    monkeypatch.setattr(tcp, "GREETING_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(TransferError, match=r"tcp://127.0.0.1:\d+/\w+: timed out"):
        sink.connect("source", fake(lambda connection: None, greets=False).address)
    assert time.monotonic() - began < 1.5


def test_a_peer_that_dribbles_gains_no_time(fake, sink, monkeypatch):
    monkeypatch.setattr(tcp, "GREETING_TIMEOUT", 0.3)

    def dribble(connection):
        for byte in struct.pack("<I", 100) + b"x" * 100:
            try:
                connection.send(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(TransferError, match="timed out"):
        sink.connect("source", fake(dribble, greets=False).address)
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("nonsense", [b"220 mail.example.org ESMTP\r\n", struct.pack("<I", 2) + b"[]", b""])
def test_a_server_that_is_something_else_is_named(fake, sink, nonsense):
    def speak(connection):
        # The sink may have hung up by then.
        with contextlib.suppress(OSError):
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)

    with pytest.raises(TransferError, match=r"does not speak|closed the connection"):
        sink.connect("source", fake(speak, greets=False).address)


def test_a_server_that_knows_no_secret_is_not_believed(fake, sink):
    def impersonate(connection):
        packets = tcp_wire.Packets(connection, time.monotonic() + 10)
        packets.send(json.dumps({"protocol": greeting.PROTOCOL, "nonce": "0"}).encode())
        packets.receive()
        packets.send(greeting.answer_of(LAYOUT, 1, b"a guess", ("0", "0")))

    with pytest.raises(TransferError, match="does not know the secret"):
        sink.connect("source", fake(impersonate, greets=False).address)


def place_of(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("tcp://").partition("/")[0].rsplit(":", 1)
    return host, int(port)


@pytest.mark.parametrize(
    "nonsense",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\0" * 64, struct.pack("<I", 4000) + b"[" * 4000, b"\x16\x03\x01"],
)
def test_strangers_get_a_challenge_and_harm_nothing(sink, nonsense):
    with socket.create_connection(place_of(sink.address), 10) as stranger:
        (length,) = struct.unpack("<I", stranger.recv(4, socket.MSG_WAITALL))
        assert json.loads(stranger.recv(length, socket.MSG_WAITALL)).keys() == {"protocol", "nonce"}
        # Nothing more is told; the connection is closed or reset, perhaps before all of it was sent.
        with contextlib.suppress(ConnectionError):
            stranger.sendall(nonsense)
            with contextlib.suppress(OSError):
                stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(4096) == b""
    ended = Ended()
    sink.connect("source", sink.address)
    sink.pull(migrate(1, (1,), (2,)), ended)
    assert ended.next().ok


def test_strangers_that_say_nothing_are_hung_up_on(sink, monkeypatch):
    monkeypatch.setattr(tcp, "GREETING_TIMEOUT", 0.2)
    began = time.monotonic()
    strangers = [socket.create_connection(place_of(sink.address), 10) for _ in range(20)]
    for stranger in strangers:
        with stranger:
            while stranger.recv(4096):
                pass
    assert time.monotonic() - began < 5


def test_a_wrong_secret_is_refused_on_both_sides(sink):
    stranger = make(secret=b"of another cluster")
    try:
        with pytest.raises(TransferError, match=r"instance source: .* the secrets differ"):
            sink.connect("source", stranger.address)
        with pytest.raises(TransferError, match="the secrets differ"):
            stranger.connect("source", sink.address)
    finally:
        stranger.close()


def test_another_version_is_told_both(sink):
    with socket.create_connection(place_of(sink.address), 10) as client:
        packets = tcp_wire.Packets(client, time.monotonic() + 10)
        packets.receive()
        packets.send(json.dumps({"protocol": 0}).encode())
        assert json.loads(packets.receive()) == {"error": f"KV transfer protocol {greeting.PROTOCOL} there, 0 here"}


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ({"dtype": "float32"}, "dtype float32 there, bfloat16 here"),
        ({"block_size": 32}, "block_size 32 there, 16 here"),
        ({"head_dim": 64}, "head_dim 64 there, 8 here"),
    ],
)
def test_layouts_that_differ_are_refused_with_both_values(sink, difference, says):
    other = make(replace(LAYOUT, **difference))
    try:
        with pytest.raises(TransferError, match=says):
            sink.connect("source", other.address)
    finally:
        other.close()


def test_an_address_that_another_rank_has_taken_over_is_noticed(sink):
    other = make()
    try:
        stale = other.address.rpartition("/")[0] + "/" + "0" * 32
        with pytest.raises(TransferError, match="a rank which is gone"):
            sink.connect("source", stale)
    finally:
        other.close()


@pytest.mark.parametrize("address", ["distserve-kv-00", "tcp://", "tcp://host/x", "tcp://h:port/x", ""])
def test_what_is_no_address_is_refused(sink, address):
    with pytest.raises(TransferError, match="is not an address of KV memory over TCP"):
        sink.connect("source", address)


def test_an_interface_that_is_not_here_is_refused():
    with pytest.raises(TransferError, match=r"cannot listen for KV peers on '192\.0\.2\.1'"):
        TcpTransport(LAYOUT, host="192.0.2.1", secret=SECRET, clock=time.time)
