"""Processes that a test drives: commands go in, answers come out. Both ends of it.

They are forked from a server that has already imported what takes seconds, and share nothing with the test.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from typing import Any

_context = get_context("forkserver")
_context.set_forkserver_preload(["distserve.engine.worker"])


class Line:
    """The process's end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def commands(self) -> Iterator[tuple[Any, ...]]:
        """What the test says, until it has no more to say."""
        with suppress(EOFError):
            while True:
                yield self._connection.recv()

    def say(self, answer: object) -> None:
        """Tell the test something, on whichever thread."""
        with self._lock:
            self._connection.send(answer)


class Peer:
    """The test's end of a process that runs ``main(line, **options)``."""

    address: str

    def __init__(self, main: Callable[..., None], **options: object) -> None:
        self._connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_run, args=(main, theirs, options, dict(os.environ)), daemon=True)
        self.process.start()
        self.pid = self.process.pid
        theirs.close()

    def read(self) -> Any:
        """The next thing that it says; raises EOFError if it has ended."""
        return self._connection.recv()

    def send(self, *command: object) -> None:
        self._connection.send(command)

    def call(self, *command: object) -> Any:
        """The answer to a command."""
        self.send(*command)
        return self.read()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it; when this returns, nothing is left of it, here or elsewhere. May be called again."""
        if not self._connection.closed:
            self._connection.close()
            self.process.kill()
            self.process.join()
            self.process.close()


@contextmanager
def starting(main: Callable[..., None]) -> Iterator[Callable[..., Peer]]:
    """A function that starts processes whose first word is their address. All are killed in the end."""
    forkserver.ensure_running()  # so that a test may count its own descriptors
    started: list[Peer] = []

    def start(**options: object) -> Peer:
        peer = Peer(main, **options)
        started.append(peer)
        peer.address = peer.read()
        return peer

    try:
        yield start
    finally:
        for peer in started:
            peer.kill()


def _run(
    main: Callable[..., None], connection: Connection, options: dict[str, Any], environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    main(Line(connection), **options)
