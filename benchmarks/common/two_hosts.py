"""Two hosts on one machine: network namespaces, a cable of limited rate between them, and a Ray node in each.

A program that uses this runs in the first namespace itself (:func:`enter_namespace`), the second one is held by a child
process. It takes root, or `unshare -Urn python -m ...` by anyone the kernel allows user namespaces. Nothing is left:
namespaces and cable go with the processes in them, and the machine's own network is not touched.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.213.0.1", "10.213.0.2")
MTU = 9000
"""Jumbo frames, as networks for such traffic have: headers take 0.7% of the rate."""
_INSIDE = "DISTSERVE_BENCHMARK_NAMESPACE"
_PATIENCE = 60.0


class HostsError(Exception):
    """The namespaces, the cable or Ray's nodes cannot be had; the message is the tool's own."""


def enter_namespace(module: str) -> None:
    """Start this program over in a network namespace of its own, unless it is in one; then return."""
    if _INSIDE in os.environ:
        return
    os.environ[_INSIDE] = "1"
    flags = "-n" if os.geteuid() == 0 else "-Urn"
    sys.stdout.flush()
    os.execvp("unshare", ["unshare", flags, sys.executable, "-m", module, *sys.argv[1:]])


@dataclass(frozen=True)
class TwoHosts:
    """``enter`` goes before a command that is to run on the second host; the first one is where this program runs."""

    enter: tuple[str, ...]


@contextmanager
def two_hosts(bytes_per_second: float) -> Iterator[TwoHosts]:
    """Both hosts until the block ends; the kernel lets ``bytes_per_second`` through the cable, each way.

    The limit counts frames with their headers (Linux's token bucket filter, tc-tbf).
    """
    holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        _wait_for_namespace(holder.pid)
        enter = ("nsenter", "-t", str(holder.pid), "-n", "--")
        _run("ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", str(holder.pid))
        for prefix, number in (((), 0), (enter, 1)):
            device = f"cable{number}"
            _run(*prefix, "ip", "link", "set", "lo", "up")
            _run(*prefix, "ip", "address", "add", f"{ADDRESSES[number]}/24", "dev", device)
            _run(*prefix, "ip", "link", "set", device, "mtu", str(MTU), "up")
            limit = ("rate", f"{8 * bytes_per_second:.0f}", "burst", "65536", "latency", "50ms")
            _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield TwoHosts(enter)
    finally:
        holder.kill()
        holder.wait()


def plain_rate(hosts: TwoHosts, num_bytes: int = 25_000_000) -> float:
    """Bytes/s of one plain TCP connection to the second host, from the first byte received to the last."""
    program = (
        "import socket, sys, time\n"
        "s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True)\n"
        "c, _ = s.accept(); n = len(c.recv(1 << 20)); t = time.monotonic()\n"
        "while (more := len(c.recv(1 << 20))): n += more\n"
        "print((n - 65536) / (time.monotonic() - t), flush=True)\n"
    )
    command = [*hosts.enter, sys.executable, "-c", program, ADDRESSES[1]]
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    with socket.create_connection((ADDRESSES[1], int(receiver.stdout.readline()))) as connection:
        connection.sendall(bytes(num_bytes))
    rate = float(receiver.stdout.readline())
    receiver.wait()
    return rate


@contextmanager
def ray_nodes(hosts: TwoHosts, cores: tuple[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray node on each host, kept to its ``cores`` (as taskset takes them); the address and environment to join with.

    Each says that it has two CPUs: rank and router of a small deployment.
    """
    directory = tempfile.mkdtemp(prefix="dsr-", dir="/tmp")
    address = f"{ADDRESSES[0]}:6379"
    environment = {
        **os.environ,
        "RAY_worker_niceness": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    head = ["--head", "--port", "6379", "--temp-dir", directory, "--include-dashboard", "false"]
    roles = (head, ["--address", address])
    log = Path(directory) / "start.log"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for number, role in enumerate(roles):
            command = [*(hosts.enter if number else ()), "taskset", "-c", cores[number]]
            command += [str(Path(sys.executable).with_name("ray")), "start", "--block", *role]
            command += ["--node-ip-address", ADDRESSES[number], "--num-cpus", "2", "--num-gpus", "0"]
            command += ["--object-store-memory", str(80 * 2**20), "--disable-usage-stats"]
            with log.open("ab") as output:
                nodes.append(
                    subprocess.Popen(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            _wait_until_started(nodes[-1], log, number + 1)
        yield address, environment
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
            try:
                node.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip()} (run as root, or within `unshare -Urn`)")


def _wait_for_namespace(pid: int) -> None:
    own = Path("/proc/self/ns/net").stat().st_ino
    end = time.monotonic() + _PATIENCE
    while Path(f"/proc/{pid}/ns/net").stat().st_ino == own:
        if time.monotonic() > end:
            raise HostsError("unshare -n made no network namespace")
        time.sleep(0.01)


def _wait_until_started(node: "subprocess.Popen[bytes]", log: Path, count: int) -> None:
    end = time.monotonic() + _PATIENCE
    while log.read_text().count("Ray runtime started") < count:
        if node.poll() is not None or time.monotonic() > end:
            raise HostsError(f"Ray did not start: {log.read_text()}")
        time.sleep(0.1)
