"""Processes that a test drives line by line: JSON commands go in, JSON lines come out. Both ends of it.

The process is a script beside the test; it finds the modules that the test finds.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_output = threading.Lock()


class Peer:
    """``script`` in a Python of its own, with ``options``, which it gets as JSON."""

    address: str

    def __init__(self, script: Path, **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def read(self) -> Any:
        """The next line that it says."""
        return json.loads(self.process.stdout.readline())

    def send(self, *command: object) -> None:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def call(self, *command: object) -> Any:
        """The answer to a command."""
        self.send(*command)
        return self.read()

    def kill(self) -> None:
        """Kill it; when this returns, nothing is left of it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def starting(script: Path) -> Iterator[Callable[..., Peer]]:
    """A function that starts ``script``, whose first line says its address. All are killed in the end."""
    started: list[Peer] = []

    def start(**options: object) -> Peer:
        peer = Peer(script, **options)
        started.append(peer)
        peer.address = peer.read()["address"]
        return peer

    try:
        yield start
    finally:
        for peer in started:
            peer.kill()


def options() -> dict[str, Any]:
    """In the process: what it was started with."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def commands() -> Iterator[list[Any]]:
    """In the process: what the test says, until it has no more to say."""
    for line in sys.stdin:
        yield json.loads(line)


def say(answer: object) -> None:
    """In the process: a line to the test, whole also when several threads speak."""
    with _output:
        print(json.dumps(answer), flush=True)
