"""Several hosts on one machine: Ray nodes with addresses of their own, and network namespaces joined by a cable.

What runs in a namespace is started by ``nsenter``; a test itself looks in through :meth:`Hosts.call`. Everything ends
with the processes that hold the namespaces: no network device, name or process is left.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from distserve.cluster.reaper import MARK, marked_processes

PATIENCE = 60.0
_CLONE_NEWNET = 0x40000000
_NODES = """
import sys, ray
from ray.cluster_utils import Cluster
common = {"object_store_memory": 80 * 2**20, "num_gpus": int(sys.argv[1])}
head = {"node_ip_address": "127.0.0.2", "num_cpus": int(sys.argv[3]), "temp_dir": sys.argv[2]}
nodes = Cluster(initialize_head=True, head_node_args={**common, **head, "include_dashboard": False})
others = [
    nodes.add_node(node_ip_address=f"127.0.0.{number}", num_cpus=int(num_cpus), **common)
    for number, num_cpus in enumerate(sys.argv[4:], start=3)
]
print("address", nodes.address, flush=True)
for line in sys.stdin:
    nodes.remove_node(others.pop(int(line)), allow_graceful=False)
    print("killed", flush=True)
nodes.shutdown()
"""


def ray_environment() -> dict[str, str]:
    """As of a user who starts Ray with a token, whether or not this one has a token of their own."""
    return {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }


class RayNodes:
    """Ray nodes of ``num_cpus`` each at 127.0.0.2, 127.0.0.3, ...; the first one is the head.

    Not at 127.0.0.1, in place of which Ray takes the machine's own address. Each says that it has ``num_gpus``.
    """

    def __init__(self, *num_cpus: int, num_gpus: int = 0) -> None:
        self.directory = tempfile.mkdtemp(prefix="dsr-", dir="/tmp")
        self.environment = {**ray_environment(), MARK: self.directory}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NODES, str(num_gpus), self.directory, *map(str, num_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        self.address = self._read("address")

    def kill(self, number: int) -> None:
        """Kill all of node ``number``'s processes, as a power cut would; the head is 0."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number - 1}\n")
        self._process.stdin.flush()
        self._read("killed")

    def instances(self) -> set[int]:
        """Process ids of the instances on all nodes."""
        return instances(self.directory)

    def rank_hosts(self) -> set[int]:
        """Process ids of those that started ranks on other nodes than their rank 0's."""
        return _called(self.directory, b"ray::RankHostProcess")

    def close(self) -> None:
        """Stop all nodes; whatever had been started on them is dead when this returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            end = time.monotonic() + PATIENCE
            while (left := marked_processes(self.directory)) and time.monotonic() < end:
                for pid in left:
                    _kill(pid)
                time.sleep(0.05)
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, _, rest = line.strip().partition(" ")
            if first == word:
                return rest
        raise AssertionError("the Ray nodes did not start")


def why_no_namespaces() -> str:
    """What keeps this user from making network namespaces; empty if nothing does."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    script = "ip link add cable0 type veth peer name cable1"
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True, check=False)
    said = done.stderr.strip().replace("\n", "; ")
    return f"{said}: run the tests as root, or within `unshare -Urn`" if done.returncode else ""


class Namespaces:
    """Network namespaces joined by a cable, at 10.213.0.1 and 10.213.0.2."""

    def __init__(self) -> None:
        self.addresses = ("10.213.0.1", "10.213.0.2")
        self._holders = [
            subprocess.Popen(["unshare", "-n", "sleep", "infinity"], start_new_session=True) for _ in self.addresses
        ]
        for holder in self._holders:
            while _namespace(holder.pid) == _namespace(os.getpid()):
                time.sleep(0.01)
        second = str(self._holders[1].pid)
        self.run(0, "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", second)
        for number, address in enumerate(self.addresses):
            self.run(number, "ip", "link", "set", "lo", "up")
            self.run(number, "ip", "address", "add", f"{address}/24", "dev", f"cable{number}")
            self.run(number, "ip", "link", "set", f"cable{number}", "up")

    def enter(self, number: int) -> list[str]:
        """What to put before a command that is to run in a namespace."""
        return ["nsenter", "-t", str(self._holders[number].pid), "-n", "--"]

    def run(self, number: int, *command: str) -> str:
        """Run a command in a namespace; its output."""
        done = subprocess.run([*self.enter(number), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def call(self, number: int, function: Callable[[], Any]) -> Any:
        """Call ``function`` on a thread whose sockets are in a namespace."""
        outcome: list[Any] = []
        libc = ctypes.CDLL(None, use_errno=True)

        def inside() -> None:
            descriptor = os.open(f"/proc/{self._holders[number].pid}/ns/net", os.O_RDONLY)
            try:
                if libc.setns(descriptor, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(descriptor)
            outcome.append(function())

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        (result,) = outcome
        return result

    def close(self) -> None:
        """Give the namespaces up; they go with their last process."""
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RayHosts:
    """A Ray node in each of two namespaces, of ``num_cpus`` each, as `ray start` makes them."""

    def __init__(self, namespaces: Namespaces, *num_cpus: int) -> None:
        self.directory = tempfile.mkdtemp(prefix="dsr-", dir="/tmp")
        self.environment = {**ray_environment(), MARK: self.directory}
        self.address = f"{namespaces.addresses[0]}:6379"
        self._nodes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--port", "6379", "--temp-dir", self.directory, "--include-dashboard", "false"]
        roles = (head, ["--address", self.address])
        ray = str(Path(sys.executable).with_name("ray"))
        log = Path(self.directory) / "start.log"
        for number, role in enumerate(roles):
            command = [ray, "start", "--block", "--node-ip-address", namespaces.addresses[number], *role]
            command += ["--num-cpus", str(num_cpus[number]), "--num-gpus", "0"]
            command += ["--object-store-memory", str(80 * 2**20), "--disable-usage-stats"]
            with log.open("ab") as output:
                node = subprocess.Popen(
                    [*namespaces.enter(number), *command],
                    env=self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._nodes.append(node)
            end = time.monotonic() + PATIENCE
            while log.read_text().count("Ray runtime started") <= number:
                if node.poll() is not None or time.monotonic() > end:
                    said = log.read_text()
                    self.close()
                    raise AssertionError(said)
                time.sleep(0.1)

    def kill(self, number: int) -> None:
        """Kill all processes of a node's namespace, as a power cut would."""
        namespace = _namespace(self._nodes[number].pid)
        for pid in marked_processes(self.directory):
            with contextlib.suppress(OSError):
                if _namespace(pid) == namespace:
                    _kill(pid)

    def close(self) -> None:
        """Kill everything."""
        end = time.monotonic() + PATIENCE
        while (left := marked_processes(self.directory)) and time.monotonic() < end:
            for pid in left:
                _kill(pid)
            time.sleep(0.05)
        for node in self._nodes:
            node.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def instances(mark: str) -> set[int]:
    """Process ids of the instances that carry a mark."""
    return _called(mark, b"ray::InstanceProcess")


def _called(mark: str, title: bytes) -> set[int]:
    found = set()
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title):
                found.add(pid)
    return found


def _namespace(pid: int) -> int:
    """The network namespace of a process."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
