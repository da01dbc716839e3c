"""What the tests of KV over TCP share: transports, a source that does as it is told, and how long a pull may take."""

import socket
import threading
import time
from dataclasses import replace

from distserve.transfer import greeting, tcp_wire
from distserve.transfer.tcp import TcpTransport
from distserve.transfer.tcp_wire import HEADER, Kind, Wanted
from tests.transfer.pools import LAYOUT, SECRET, Ended

BIG = replace(LAYOUT, num_blocks=512, head_dim=128)
"""Blocks of 8 KiB, planes of 4 MiB: pulls of all of it take dozens of frames."""
ALL = tuple(range(BIG.num_blocks))


def make(layout=LAYOUT, secret=SECRET) -> TcpTransport:
    return TcpTransport(layout, host="127.0.0.1", secret=secret, clock=time.time)


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


def request_of(connection: socket.socket) -> Wanted:
    """Read a PULL frame."""
    kind, _, num_bytes, number = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
    assert (kind, number) == (Kind.PULL, 1)
    return Wanted.decode(connection.recv(num_bytes, socket.MSG_WAITALL), LAYOUT)


def in_time(ended: Ended, seconds: float):
    """The pull ended within its deadline and a second for a busy machine."""
    return ended.next(timeout=seconds + 1.0)
