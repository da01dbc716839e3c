"""Starts ``distserve serve`` as a user does, and looks at what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distserve.cluster.reaper import MARK

START_PATIENCE = 120.0


class Server:
    """A ``distserve serve`` process, with ``prefix`` before its command and ``environment`` in place of ours.

    ``program`` are python's arguments for another command that serves.
    """

    def __init__(
        self,
        *arguments: str,
        log: Path,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = os.environ,
        program: Sequence[str] = ("-m", "distserve.cli", "serve"),
    ) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *program, "--port", "0", *arguments],
                stderr=file,
                stdout=file,
                start_new_session=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )
        self.url = ""

    def wait_ready(self) -> None:
        end = time.monotonic() + START_PATIENCE
        while time.monotonic() < end:
            found = re.search(r"^Serving .* at (http://\S+)/v1 on (.*)$", self.log.read_text(), re.MULTILINE)
            if found:
                self.url = found[1]
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """As a terminal does on Ctrl-C: to every process of the group."""
        os.killpg(self.process.pid, number)

    def open(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=timeout)

    def call(self, path: str, body: Any = None) -> tuple[int, Any]:
        """HTTP status and JSON of one request."""
        try:
            with self.open(path, body) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def token_ids(self, prompt: list[int], num_tokens: int) -> Iterator[int]:
        """Greedy tokens of a prompt as they stream."""
        with self.open("/v1/completions", stream_body(prompt, num_tokens)) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    for choice in chunk["choices"]:
                        yield from choice["token_ids"] or ()

    def processes(self) -> dict[int, str]:
        """Process ids and titles of everything that belongs to the server and runs, itself included."""
        found = {self.process.pid: "launcher"} if self.process.poll() is None else {}
        for pid, title in marked().items():
            if self.session is not None and title[1] == self.session:
                found[pid] = title[0]
        return found

    @property
    def session(self) -> str | None:
        """Directory of the server's session, as its processes know it."""
        if not hasattr(self, "_session"):
            children = {pid for pid in marked() if _session_leader(pid) == self.process.pid}
            sessions = {marked().get(pid, ("", ""))[1] for pid in children} - {""}
            if not sessions:
                return None
            (self._session,) = sessions
        return self._session

    def instances(self) -> list[int]:
        """Process ids of the instances."""
        return [pid for pid, title in self.processes().items() if title.startswith("ray::InstanceProcess")]

    def routers(self) -> list[int]:
        """Process ids of the routers: one, but for moments."""
        return [pid for pid, title in self.processes().items() if title.startswith("ray::RouterProcess")]

    def shared_memory(self) -> set[Path]:
        """Named shared memory that the server's processes have mapped."""
        maps = [line for pid in self.processes() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        names = {line.partition("/dev/shm/")[2].removesuffix(" (deleted)") for line in maps if "/dev/shm/" in line}
        return {Path("/dev/shm") / name for name in names}

    def wait_gone(self, patience: float = 15.0) -> dict[int, str]:
        """What is left of the server's processes after at most ``patience`` seconds."""
        end = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def stream_body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def marked() -> dict[int, tuple[str, str]]:
    """Title and session directory of every live process that carries a session's mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        for variable in environment:
            if variable.startswith(MARK.encode() + b"="):
                found[int(entry.name)] = (title, variable.decode().partition("=")[2])
    return found


def _session_leader(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
