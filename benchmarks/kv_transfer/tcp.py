"""Measures pulls of KV over TCP against a plain socket copy of the same bytes, both over loopback, in one run.

    python benchmarks/kv_transfer/tcp.py --output benchmarks/kv_transfer/tcp.json

The source is a process of its own. The plain copy is what any program would do: the other process calls ``sendall`` on
contiguous memory, this one ``recv_into`` contiguous memory, over a connection with the same options; it is told of each
copy by a byte. Both are timed here from the request to the last byte, alternating, one at a time.

``contiguous`` is one run of blocks, ``scattered`` puts every block at a random place on both sides, ``split`` is a rank
with all heads that takes half of each token from a rank with half of the heads (scattered too).
"""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import socket
import statistics
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.events import Migrated
from distserve.transfer.plan import Part
from distserve.transfer.tcp import TcpTransport

SECRET = b"benchmark"
LAYOUTS = {
    "demo": KvLayout(num_layers=4, num_blocks=2048, block_size=16, num_kv_heads=2, head_dim=32, dtype="bfloat16"),
    "768": KvLayout(num_layers=12, num_blocks=512, block_size=16, num_kv_heads=4, head_dim=64, dtype="bfloat16"),
    "8B": KvLayout(num_layers=32, num_blocks=160, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}
"""As in ``run.py``, with smaller pools."""
PLACEMENTS = ("contiguous", "scattered", "split")


@dataclass(frozen=True)
class Case:
    """One layout, size and placement; medians, seconds and bytes. A ratio is pull's bandwidth over plain copy's."""

    layout: str
    num_tokens: int
    placement: str
    num_bytes: int
    pull_bandwidth: float
    plain_bandwidth: float
    ratio: float
    low_ratio: float
    """10th percentile of the paired ratios."""


def source_process(pipe: Connection, layout: KvLayout) -> None:
    """Own a pool of all heads and one of half of them, and serve plain copies until told to end."""
    half = replace(layout, num_kv_heads=layout.num_kv_heads // 2)
    transports = [TcpTransport(some, host="127.0.0.1", secret=SECRET, clock=time.monotonic) for some in (layout, half)]
    for transport in transports:
        np.frombuffer(transport.buffer, dtype=np.uint8)[:] = 7
    plain = memoryview(bytearray(transports[0].buffer))
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send(([transport.address for transport in transports], server.getsockname()[1]))
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := connection.recv(8, socket.MSG_WAITALL):
        connection.sendall(plain[: int.from_bytes(request, "little")])
    for transport in transports:
        transport.close()
    connection.close()
    server.close()


class Destination:
    """The pulling side and the plain copy beside it."""

    def __init__(self, layout: KvLayout, addresses: list[str], port: int) -> None:
        self.layout = layout
        self.transport = TcpTransport(layout, host="127.0.0.1", secret=SECRET, clock=time.monotonic)
        heads = range(layout.num_kv_heads // 2)
        layers = range(layout.num_layers)
        self.transport.connect("whole", addresses[0])
        self.transport.connect("half", addresses[1], Part(layout.num_layers, len(heads), layers, heads, layers, heads))
        self._plain = memoryview(bytearray(b"\1") * layout.num_bytes)
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ended: queue.SimpleQueue[Migrated] = queue.SimpleQueue()
        self._pull_id = 0

    def close(self) -> None:
        """Let go of the source."""
        self.transport.close()
        self._connection.close()

    def pull_seconds(self, source: str, src_blocks: np.ndarray, dst_blocks: np.ndarray) -> float:
        """Time of a pull of blocks that are all ready, from the call to the callback."""
        self._pull_id += 1
        blocks = tuple(src_blocks.tolist()), tuple(dst_blocks.tolist())
        deadline = time.monotonic() + 60
        command = Migrate(self._pull_id, ("request", 0), source, *blocks, len(src_blocks), 0, deadline)
        began = time.monotonic()
        self.transport.pull(command, self._ended.put)
        event = self._ended.get(timeout=60)
        taken = time.monotonic() - began
        assert event.ok, event.reason
        return taken

    def plain_seconds(self, num_bytes: int) -> float:
        """Time of a plain copy."""
        began = time.monotonic()
        self._connection.sendall(num_bytes.to_bytes(8, "little"))
        got = 0
        while got < num_bytes:
            got += self._connection.recv_into(self._plain[got:num_bytes])
        return time.monotonic() - began


def measure(name: str, destination: Destination, num_tokens: int, placement: str, repetitions: int) -> Case:
    """Alternate pulls and plain copies of the same number of bytes."""
    layout = destination.layout
    num_blocks = num_tokens // layout.block_size
    num_bytes = num_tokens * layout.token_bytes // (2 if placement == "split" else 1)
    rng = np.random.default_rng(num_tokens)

    def somewhere() -> np.ndarray:
        if placement == "contiguous":
            start = rng.integers(0, layout.num_blocks - num_blocks + 1)
            return np.arange(start, start + num_blocks)
        return rng.permutation(layout.num_blocks)[:num_blocks]

    pairs = []
    for _ in range(repetitions + 2):
        pull = destination.pull_seconds("half" if placement == "split" else "whole", somewhere(), somewhere())
        pairs.append((pull, destination.plain_seconds(num_bytes)))
    pairs = pairs[2:]
    ratios = sorted(plain / pull for pull, plain in pairs)
    return Case(
        name,
        num_tokens,
        placement,
        num_bytes,
        num_bytes / statistics.median(pull for pull, _ in pairs),
        num_bytes / statistics.median(plain for _, plain in pairs),
        statistics.median(ratios),
        ratios[len(ratios) // 10],
    )


def row(case: Case) -> str:
    """A case as a line of Markdown."""
    return (
        f"| {case.layout} | {case.num_tokens} | {case.placement} | {case.num_bytes / 1e6:.1f} "
        f"| {case.pull_bandwidth / 1e9:.2f} | {case.plain_bandwidth / 1e9:.2f} | {case.ratio:.2f} "
        f"| {case.low_ratio:.2f} |"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="what to measure")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048], help="lengths of the prompts")
    parser.add_argument("--repetitions", type=int, default=21, help="pairs of pull and plain copy")
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    options = parser.parse_args()
    cases = []
    print("| layout | tokens | blocks | MB | pull GB/s | plain GB/s | ratio | P10 |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for name in options.layouts:
        pipe, theirs = multiprocessing.Pipe()
        source = multiprocessing.get_context("spawn").Process(target=source_process, args=(theirs, LAYOUTS[name]))
        source.start()
        destination = Destination(LAYOUTS[name], *pipe.recv())
        for num_tokens in options.tokens:
            for placement in PLACEMENTS:
                cases.append(measure(name, destination, num_tokens, placement, options.repetitions))
                print(row(cases[-1]), flush=True)
        destination.close()
        source.join()
    if options.output is not None:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"machine": machine, "cases": [asdict(case) for case in cases]}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
