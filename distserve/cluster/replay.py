"""Event logs of live machines, and their replay: the same events must give the same commands.

A log is one file of records: a head (kind, length, time) and then the msgpack of an event or of a command it caused. It
is written by the process that runs the machine, in the order things happened, and read by whoever wants to know why a
scheduler did what it did.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from distserve.cluster.wire import COMMANDS, EVENTS
from distserve.core.commands import Command
from distserve.core.errors import ConfigError
from distserve.core.events import Event, Machine

_EVENT, _COMMAND = b"e", b"c"
_HEAD = struct.Struct("<cIxxxd")


def check_log_directory(directory: Path) -> None:
    """Make ``directory`` for logs; raises ConfigError if there can be none, or nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--event-log {directory} cannot be a directory: {error.strerror or error}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"--event-log {directory}: nothing can be written there")


class EventLog:
    """Writes the events and commands of one machine to ``path``, which must not exist yet.

    A process that is killed loses what the last second or so had not flushed; the file stays readable.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if ``path`` cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("xb")
        except OSError as error:
            raise ConfigError(f"cannot write the event log {path}: {error.strerror or error}") from error
        self._flushed = 0.0

    @classmethod
    def of(cls, name: str, directory: Path) -> Self:
        """A new log of the part ``name``: ``name.log``, or ``name-2.log`` and so on beside logs of its predecessors."""
        path, number = directory / f"{name}.log", 1
        while path.exists():
            number += 1
            path = directory / f"{name}-{number}.log"
        return cls(path)

    def event(self, now: float, event: Event) -> None:
        """Record ``event``, handled at ``now``."""
        self._write(_EVENT, now, EVENTS.encode(event))
        if now - self._flushed > 1.0:
            self._file.flush()
            self._flushed = now

    def command(self, command: Command) -> None:
        """Record a command caused by the event before it."""
        self._write(_COMMAND, 0.0, COMMANDS.encode(command))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, kind: bytes, now: float, data: bytes) -> None:
        self._file.write(_HEAD.pack(kind, len(data), now))
        self._file.write(data)


def read_log(path: Path) -> Iterator[tuple[float, Event, list[Command]]]:
    """Each event of a log with its time and the commands it caused, in order.

    A record cut short by the death of its writer ends the log; the last event's commands may then be incomplete.
    """
    pending: tuple[float, Event, list[Command]] | None = None
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            kind, length, now = _HEAD.unpack(head)
            data = file.read(length)
            if len(data) < length:
                break
            if kind == _COMMAND:
                assert pending is not None, "a log begins with an event"
                pending[2].append(COMMANDS.decode(data))
                continue
            if pending is not None:
                yield pending
            pending = (now, EVENTS.decode(data), [])
    if pending is not None:
        yield pending


def replay(path: Path, machine: Machine) -> Iterator[tuple[float, Event, list[Command], list[Command]]]:
    """Feed a log's events to a fresh machine.

    Yields:
        ``(now, event, logged, replayed)``: commands of the live run, and those ``machine`` gives, which are encoded
        and decoded once so that the two compare equal if and only if they are the same.
    """
    for now, event, logged in read_log(path):
        replayed = [COMMANDS.decode(COMMANDS.encode(command)) for command in machine.handle(now, event)]
        yield now, event, logged, replayed
