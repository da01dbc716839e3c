import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def start_stub() -> Iterator[Callable[..., str]]:
    """Start a stub server with the given flags, as a process of its own; returns its URL."""
    started: list[subprocess.Popen[str]] = []

    def start(**flags: object) -> str:
        arguments = [
            f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
            for name, value in flags.items()
        ]
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stub_server.py")), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in started:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()
