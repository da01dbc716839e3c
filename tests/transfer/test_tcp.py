"""KV over TCP when peers die, stall, lie, or are somebody else. Every wait has an end that was named beforehand."""

import contextlib
import json
import re
import signal
import socket
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distserve.core.errors import TransferError
from distserve.transfer import greeting, tcp, tcp_wire
from distserve.transfer.tcp import TcpTransport
from distserve.transfer.tcp_wire import HEADER, Kind, Wanted
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, fill, migrate

BIG = replace(LAYOUT, num_blocks=512, head_dim=128)
"""Blocks of 8 KiB, planes of 4 MiB: pulls of all of it take dozens of frames."""
ALL = tuple(range(BIG.num_blocks))


def make(layout=LAYOUT, secret=SECRET) -> TcpTransport:
    return TcpTransport(layout, host="127.0.0.1", secret=secret, clock=time.time)


@pytest.fixture
def sink():
    transport = make()
    yield transport
    transport.close()


@pytest.fixture
def big_sink():
    transport = make(BIG)
    yield transport
    transport.close()


def whole(seed: int) -> np.ndarray:
    pool = bytearray(BIG.num_bytes)
    fill(memoryview(pool), BIG, seed)
    return blocks_of(memoryview(pool), BIG)


def big_peer(start, **options):
    return start(transport="tcp", layout={"num_blocks": BIG.num_blocks, "head_dim": BIG.head_dim}, **options)


class Fake:
    """A source that greets as it should and then does what ``behave(connection)`` does."""

    def __init__(self, behave, layout=LAYOUT, *, greets=True):
        self._server, self.address, self._name = tcp_wire.listen("127.0.0.1")
        self._behave, self._layout, self._greets = behave, layout, greets
        self._let_go = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        connection, _ = self._server.accept()
        with connection:
            if self._greets:
                packets = tcp_wire.Packets(connection, time.monotonic() + 10)
                nonces = greeting.examine(packets, SECRET, self._name, self._layout)
                packets.send(greeting.answer_of(self._layout, 1, SECRET, nonces))
            connection.settimeout(20)
            self._behave(connection)
            self._let_go.wait(20)

    def close(self):
        self._let_go.set()
        self._thread.join()
        self._server.close()


@pytest.fixture
def fake():
    fakes = []

    def starter(*arguments, **options):
        fakes.append(Fake(*arguments, **options))
        return fakes[-1]

    yield starter
    for started in fakes:
        started.close()


def request_of(connection: socket.socket) -> Wanted:
    """Read a PULL frame."""
    kind, _, num_bytes, number = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
    assert (kind, number) == (Kind.PULL, 1)
    return Wanted.decode(connection.recv(num_bytes, socket.MSG_WAITALL), LAYOUT)


def in_time(ended: Ended, seconds: float):
    """The pull ended within its deadline and a second for a busy machine."""
    return ended.next(timeout=seconds + 1.0)


@pytest.mark.parametrize("blocks", [ALL, ALL[::-1], tuple(np.random.default_rng(0).permutation(512).tolist())])
def test_many_frames_arrive_from_another_process(start, big_sink, blocks):
    source, ended = big_peer(start, seed=4), Ended()
    big_sink.connect("source", source.address)
    big_sink.pull(migrate(1, blocks, ALL), ended)
    assert ended.next().ok
    assert np.array_equal(blocks_of(big_sink.buffer, BIG), whole(4)[:, :, list(blocks)])


def test_a_pull_overlaps_the_step_of_another_process(start, sink):
    source, ended = start(transport="tcp", seed=3), Ended()
    sink.connect("source", source.address)
    source.call("begin_step", 1)
    sink.pull(migrate(1, (4, 5), (0, 1), ready=1, step=1), ended)
    assert ended.none()
    source.call("layer_done", 1, 2)
    assert ended.none()
    assert blocks_of(sink.buffer, LAYOUT)[:3, :, 1].any()
    assert not blocks_of(sink.buffer, LAYOUT)[3:, :, 1].any()
    source.call("end_step", 1)
    assert ended.next().ok


def test_a_source_killed_while_it_is_read(start, big_sink):
    """What is reported as good is good, the rest fails at once, and a new source serves."""
    want = whole(5)
    for delay in (0.0, 0.01, 0.05):
        source, ended = big_peer(start, seed=5), Ended()
        big_sink.connect("source", source.address)
        blocks_of(big_sink.buffer, BIG)[:] = 0
        for pull_id in range(20):
            big_sink.pull(migrate(pull_id, ALL, ALL), ended)
        time.sleep(delay)
        source.kill()
        events = [ended.next(timeout=5) for _ in range(20)]
        assert sorted(event.pull_id for event in events) == list(range(20))
        assert all(event.ok or "source" in event.reason for event in events)
        if any(event.ok for event in events):
            assert np.array_equal(blocks_of(big_sink.buffer, BIG), want)


def test_a_source_that_is_stopped_fails_pulls_at_their_deadline_and_serves_when_it_goes_on(start, big_sink):
    source, ended = big_peer(start, seed=6), Ended()
    big_sink.connect("source", source.address)
    source.signal(signal.SIGSTOP)
    try:
        deadline = time.time() + 0.3
        big_sink.pull(migrate(1, ALL, ALL, deadline=deadline), ended)
        event = in_time(ended, 0.3)
        assert (event.ok, event.reason) == (False, "deadline passed")
        blocks_of(big_sink.buffer, BIG)[:] = 0
    finally:
        source.signal(signal.SIGCONT)
    big_sink.pull(migrate(2, ALL[:9], ALL[:9]), ended)
    assert ended.next().ok
    # What was still on its way for the pull that failed went nowhere.
    assert np.array_equal(blocks_of(big_sink.buffer, BIG)[:, :, :9], whole(6)[:, :, :9])
    assert not blocks_of(big_sink.buffer, BIG)[:, :, 9:].any()


def test_a_source_that_stalls_within_a_frame_holds_nobody_past_the_deadline(fake, sink):
    def stall(connection):
        wanted = request_of(connection)
        assert wanted.blocks == (1, 2)
        num_bytes = 8 * 2 * LAYOUT.block_bytes
        connection.sendall(HEADER.pack(Kind.DATA, 8, num_bytes, 1) + b"\7" * 100)

    ended = Ended()
    sink.connect("source", fake(stall).address)
    sink.pull(migrate(1, (1, 2), (1, 2), deadline=time.time() + 0.3), ended)
    assert in_time(ended, 0.3).reason == "deadline passed"


def test_late_bytes_of_an_ended_pull_are_not_written(fake, sink):
    cancelled = threading.Event()

    def dawdle(connection):
        request_of(connection)
        num_bytes = 8 * LAYOUT.block_bytes
        connection.sendall(HEADER.pack(Kind.DATA, 8, num_bytes, 1) + b"\7" * 10)
        assert HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL)) == (Kind.CANCEL, 0, 0, 1)
        assert cancelled.wait(10)
        connection.sendall(b"\7" * (num_bytes - 10))
        kind, _, num_bytes, number = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
        assert (kind, number) == (Kind.PULL, 2)
        connection.recv(num_bytes, socket.MSG_WAITALL)
        connection.sendall(HEADER.pack(Kind.DATA, 8, 8 * LAYOUT.block_bytes, 2) + b"\x09" * 8 * LAYOUT.block_bytes)
        connection.sendall(HEADER.pack(Kind.END, 0, 0, 2))

    ended = Ended()
    sink.connect("source", fake(dawdle).address)
    sink.pull(migrate(1, (1,), (1,)), ended)
    time.sleep(0.1)
    sink.cancel(1)
    assert ended.next().reason == "cancelled"
    blocks_of(sink.buffer, LAYOUT)[:] = 0
    cancelled.set()
    sink.pull(migrate(2, (2,), (2,)), ended)
    assert ended.next().ok
    ours = blocks_of(sink.buffer, LAYOUT)
    assert (ours[:, :, 2] == 9).all()
    assert not ours[:, :, [1, *range(3, 32)]].any()


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 64,
        HEADER.pack(Kind.DATA, 8, 8 * LAYOUT.block_bytes + 1, 1),
        HEADER.pack(Kind.DATA, 9, 8 * LAYOUT.block_bytes, 1),
        HEADER.pack(Kind.DATA, 0, 0, 1),
        HEADER.pack(Kind.DATA, 8, 8 * LAYOUT.block_bytes, 2),
        HEADER.pack(Kind.DATA, 8, 2**32 - 1, 1),
        HEADER.pack(Kind.END, 0, 2**20, 1),
        HEADER.pack(Kind.PULL, 0, 0, 1),
        HEADER.pack(Kind.END, 0, 0, 1),
    ],
)
def test_a_source_that_breaks_the_protocol_fails_the_pull_and_writes_nothing(fake, sink, answer):
    def lie(connection):
        request_of(connection)
        connection.sendall(answer)

    ended = Ended()
    sink.connect("source", fake(lie).address)
    sink.pull(migrate(1, (1,), (1,)), ended)
    event = ended.next(timeout=5)
    assert not event.ok
    assert "instance source" in event.reason
    assert not np.frombuffer(sink.buffer, np.uint8).any()


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


def test_a_client_that_breaks_the_protocol_is_dropped_and_others_are_served(sink):
    connection, _ = tcp_wire.dial(sink.address, SECRET, LAYOUT, 5.0)
    with connection:
        connection.setblocking(True)
        connection.settimeout(10)
        connection.sendall(HEADER.pack(Kind.PULL, 0, 2**32 - 1, 1))
        assert connection.recv(100) == b""
    ended = Ended()
    sink.connect("source", sink.address)
    sink.pull(migrate(1, (1,), (2,)), ended)
    assert ended.next().ok


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(0, 1, range(3, 5), range(2), (1,)), "layers 3..4 and KV heads 0..1 are not all within 4 layers and 2"),
        (Wanted(0, 1, range(4), range(1, 3), (1,)), "KV heads 1..2"),
        (Wanted(0, 1, range(4), range(2), (32,)), r"source block 32 is not within 0\.\.31"),
        (Wanted(0, 2, range(4), range(2), (1,)), "malformed"),
        (Wanted(0, 0, range(2, 2), range(2), ()), "layers"),
    ],
)
def test_pulls_of_what_is_not_there_are_refused(sink, wanted, says):
    connection, _ = tcp_wire.dial(sink.address, SECRET, LAYOUT, 5.0)
    with connection:
        connection.settimeout(10)
        body = wanted.encode()
        connection.sendall(HEADER.pack(Kind.PULL, 0, len(body), 1) + body)
        kind, _, num_bytes, number = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
        assert (kind, number) == (Kind.END, 1)
        reason = connection.recv(num_bytes, socket.MSG_WAITALL).decode()
    assert re.search(says, reason)


def test_a_client_that_does_not_read_stops_only_itself(big_sink):
    """The source holds no more for it than the system's buffers and a frame."""
    connection, _ = tcp_wire.dial(big_sink.address, SECRET, BIG, 5.0)
    with connection:
        connection.setblocking(True)
        for number in range(1, 50):
            body = Wanted(0, 512, range(4), range(2), ALL).encode()
            connection.sendall(HEADER.pack(Kind.PULL, 0, len(body), number) + body)
        ended = Ended()
        other = make(BIG)
        other.connect("source", big_sink.address)
        other.pull(migrate(1, ALL, ALL), ended)
        assert ended.next().ok
        other.close()


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


def num_descriptors():
    """Open ones, but for shared memory: TCP has none, and what other tests left of it comes and goes."""
    num = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            num += "memfd:" not in str(entry.readlink())
    return num


def test_closing_leaves_no_descriptor_and_no_thread():
    before, threads = num_descriptors(), threading.active_count()
    for _ in range(3):
        one, other, ended = make(), make(), Ended()
        one.connect("source", other.address)
        one.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
        other.close()
        assert "closed" in ended.next().reason
        one.close()
        one.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (num_descriptors() > before or threading.active_count() > threads):
        time.sleep(0.01)
    assert num_descriptors() <= before
    assert threading.active_count() <= threads
