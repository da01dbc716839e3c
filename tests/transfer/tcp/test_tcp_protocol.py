"""KV over TCP with peers that stall, lie or do not listen. Every wait has an end that was named beforehand."""

import re
import socket
import threading
import time

import numpy as np
import pytest

from distserve.transfer import tcp_wire
from distserve.transfer.tcp_wire import HEADER, Kind, Wanted
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, migrate
from tests.transfer.tcp.ends import ALL, BIG, in_time, make, request_of


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
