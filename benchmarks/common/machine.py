"""What a figure must be read with: the machine, the versions, the command and the date."""

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.common.servers import Server

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("distserve", "torch", "transformers", "ray", "numpy")


def describe_run(module: str) -> dict[str, Any]:
    """Facts about this run of ``python -m module``."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def cpu_name() -> str:
    """The processor, with its matrix instructions, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = fields.get("flags", "").split()
    matrix = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in flags]
    name = fields.get("model name", platform.processor())
    return f"{name}, family {fields.get('cpu family')} model {fields.get('model')} ({', '.join(matrix)})"


def commit() -> str:
    """The working tree's commit, marked when it has changes; empty outside a repository."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return described.stdout.strip()


class OtherLoad:
    """A context that counts the cores which processes other than ``servers``, this one and its clients keep busy.

    A measurement is worth what ``cores`` is near 0; not a number before the context's end.
    """

    def __init__(self, *servers: Server) -> None:
        self._servers = servers
        self.cores = float("nan")

    def __enter__(self) -> Self:
        self._began, self._before = time.monotonic(), self._cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.monotonic() - self._began
        self.cores = round((self._cpu_seconds() - self._before) / elapsed, 3)

    def _cpu_seconds(self) -> float:
        """Core seconds so far of the whole machine, less those of the servers, this process and what it waited for."""
        whole = psutil.cpu_times()
        mine = psutil.Process().cpu_times()
        own = mine.user + mine.system + mine.children_user + mine.children_system
        return whole.user + whole.nice + whole.system - own - sum(server.cpu_seconds() for server in self._servers)
