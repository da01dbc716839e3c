"""Servers under measurement: started, waited for, watched and stopped, with every process they are made of.

Knows nothing of what is asked of them.
"""

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

_POLL_SECONDS = 0.05
_SAMPLE_SECONDS = 2.0
_STOP_SECONDS = 60.0


class ServerError(Exception):
    """A server did not start, or died; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a server's processes hold together. RSS counts a page once per process that maps it, PSS once."""

    rss: int
    pss: int
    num_processes: int


@dataclass(frozen=True)
class Server:
    """A server that answers.

    ``roots`` are the processes that were started. ``ready_seconds`` counts from the start of the first to the first
    successful answer of the health check.
    """

    name: str
    url: str
    roots: tuple[psutil.Process, ...]
    ready_seconds: float

    def processes(self) -> list[psutil.Process]:
        """The processes that were started and all their descendants."""
        return [process for root in self.roots for process in (root, *root.children(recursive=True))]

    def memory(self) -> Memory:
        """What they hold now."""
        rss = pss = num = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                info = process.memory_full_info()
                rss, pss, num = rss + info.rss, pss + info.pss, num + 1
        return Memory(rss, pss, num)

    def cpu_seconds(self) -> float:
        """CPU time that its living processes have used so far."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def idle_cores(self, seconds: float = 3.0) -> float:
        """Cores that it keeps busy while nobody asks it anything."""
        before, start = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop its processes (SIGSTOP) until the block ends: whoever spins while idle burdens what is measured."""
        stopped = self.processes()
        try:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    @contextmanager
    def watching_memory(self) -> Iterator[list[Memory]]:
        """Yields a list to which samples are added, every two seconds, until the block ends."""
        samples: list[Memory] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_SAMPLE_SECONDS):
                samples.append(self.memory())

        watcher = threading.Thread(target=watch, name="memory")
        watcher.start()
        try:
            yield samples
        finally:
            ended.set()
            watcher.join()

    def metrics(self) -> dict[str, float]:
        """Its Prometheus samples, by name with labels as exposed."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


@dataclass(frozen=True)
class Starting:
    """A server whose process runs, but which may not answer yet."""

    name: str
    url: str
    log: Path
    process: "subprocess.Popen[bytes]"
    root: psutil.Process
    started: float

    def ready(self, limit: float = 300.0) -> Server:
        """The server once ``url``/health answers 200.

        Raises:
            ServerError: it ended, or did not answer within ``limit`` seconds.
        """
        while not _healthy(self.url):
            elapsed = time.monotonic() - self.started
            status = self.process.poll()
            if status is not None or elapsed > limit:
                state = f"ended with status {status}" if status is not None else "is not ready"
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise ServerError(f"{self.name} {state} after {elapsed:.0f} s ({self.log}):\n{tail}")
            time.sleep(_POLL_SECONDS)
        return Server(self.name, self.url, (self.root,), time.monotonic() - self.started)


@contextmanager
def starting(
    name: str, command: Sequence[str | Path], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Starting]:
    """Run ``command``, whose output goes to ``log``, until the block ends."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    root = psutil.Process(process.pid)
    try:
        yield Starting(name, url, log, process, root, started)
    finally:
        _stop(process, root)


@contextmanager
def running(
    name: str, command: Sequence[str | Path], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run ``command`` as :func:`starting` does and yield the server once it answers."""
    with starting(name, command, url, log, environment) as server:
        yield server.ready()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stop(process: "subprocess.Popen[bytes]", root: psutil.Process) -> None:
    """End the process by SIGTERM and wait for every descendant; whatever is left after a minute is killed."""
    family = root.children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=10)
    for survivor in left:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()


def unwind_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that the servers it started are stopped."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
