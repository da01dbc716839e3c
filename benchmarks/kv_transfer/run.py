"""Measures pulls of KV between two processes against a plain copy of the same bytes between the same processes.

    python benchmarks/kv_transfer/run.py --output benchmarks/kv_transfer/result.json

The source is a process of its own. The plain copy is one ``memmove`` of contiguous bytes out of a second mapping of
that process's memory into a second pool, allocated, advised and populated exactly as the KV pools are. Both are timed
in this process, alternating, over regions that change from one repetition to the next. ``scattered`` puts every block
of a pull at a random place on both sides, so each piece is one block's keys (or values) of one layer; ``contiguous``
is one run of blocks.

Bandwidth is that of pulls that queue, as they do under load: as many as come to 64 MB, at most 8, from the first call
to the last completion callback, against as many plain copies. A pull alone is timed too: there the hand-over to the
transfer thread and back counts in full.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.events import Migrated
from distserve.transfer import handshake, segment
from distserve.transfer.shm import ShmTransport

SECRET = b"benchmark"
LAYOUTS = {
    "demo": KvLayout(num_layers=4, num_blocks=8192, block_size=16, num_kv_heads=2, head_dim=32, dtype="bfloat16"),
    "768": KvLayout(num_layers=12, num_blocks=1024, block_size=16, num_kv_heads=4, head_dim=64, dtype="bfloat16"),
    "8B": KvLayout(num_layers=32, num_blocks=384, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}
"""The embedded demo model with its default pool, the 768-hidden model of the CPU comparison, and Llama-3-8B."""


@dataclass(frozen=True)
class Case:
    """One layout, size and placement; medians, seconds and bytes. A ratio is pull's bandwidth over plain copy's."""

    layout: str
    num_tokens: int
    placement: str
    num_bytes: int
    """Of one pull."""
    piece_bytes: int
    num_queued: int
    pull_bandwidth: float
    plain_bandwidth: float
    ratio: float
    """Median of the paired ratios of queued pulls."""
    low_ratio: float
    """10th percentile of the same."""
    alone_seconds: float
    alone_ratio: float
    """Median of the paired ratios of pulls alone."""


@dataclass(frozen=True)
class Overlap:
    """How long after the source's last layer a pull that ran along with the step ends, and what waiting costs."""

    layout: str
    layer_seconds: float
    lag_median: float
    lag_p90: float
    waiting_cpu: float
    """Share of a core the destination takes while the source computes."""


def source_process(pipe: Connection, layout: KvLayout) -> None:
    """Own a KV pool and a plain one, and run pretended steps on request until told to end."""
    transports = [ShmTransport(layout, secret=SECRET, clock=time.monotonic) for _ in range(2)]
    for transport in transports:
        words = np.frombuffer(transport.buffer, dtype=np.uint64)
        words[:] = np.arange(words.size)
    pipe.send([transport.address for transport in transports])
    while (order := pipe.recv()) is not None:
        step_id, layer_seconds = order
        transports[0].begin_step(step_id)
        for layer in range(layout.num_layers):
            time.sleep(layer_seconds)
            transports[0].layer_done(step_id, layer)
        ended = time.monotonic()
        transports[0].end_step(step_id)
        pipe.send(ended)
    for transport in transports:
        transport.close()


class Ends:
    """A callback of ``count`` pulls that wakes whoever waits once, at the last."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._at = 0.0
        self._all = threading.Event()

    def __call__(self, event: Migrated) -> None:
        """Count a pull that ended."""
        assert event.ok, event.reason
        self._left -= 1
        if self._left == 0:
            self._at = time.monotonic()
            self._all.set()

    def wait(self) -> float:
        """Return the time of the last callback."""
        if not self._all.wait(60):
            raise TimeoutError("a pull did not end")
        return self._at


class Destination:
    """The pulling side and the plain copy beside it."""

    def __init__(self, layout: KvLayout, kv_address: str, plain_address: str) -> None:
        self.layout = layout
        self.transport = ShmTransport(layout, secret=SECRET, clock=time.monotonic)
        self.transport.connect("source", kv_address)
        self._connection, offered = handshake.dial(plain_address, SECRET, layout, 5.0)
        self._plain_src = np.frombuffer(segment.attach(offered.pool_fd, layout.num_bytes), dtype=np.uint8)
        self._plain_fd, plain_pool = segment.create("distserve-plain", layout.num_bytes)
        self._plain_dst = np.frombuffer(plain_pool, dtype=np.uint8)
        for fd in (offered.pool_fd, offered.progress_fd):
            os.close(fd)
        self._pull_id = 0

    def close(self) -> None:
        """Let go of the source and the pools."""
        self.transport.close()
        self._connection.close()
        os.close(self._plain_fd)

    def command(self, src_blocks: np.ndarray, dst_blocks: np.ndarray, num_ready: int, step: int) -> Migrate:
        """A command that the scheduler would give."""
        self._pull_id += 1
        blocks = tuple(src_blocks.tolist()), tuple(dst_blocks.tolist())
        return Migrate(self._pull_id, ("request", 0), "source", *blocks, num_ready, step, time.monotonic() + 60)

    def pull_seconds(self, pulls: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Time from the first call to the last callback of pulls of blocks that are all ready."""
        commands = [self.command(src_blocks, dst_blocks, len(src_blocks), 0) for src_blocks, dst_blocks in pulls]
        ended = Ends(len(commands))
        began = time.monotonic()
        for command in commands:
            self.transport.pull(command, ended)
        return ended.wait() - began

    def plain_seconds(self, offsets: list[tuple[int, int]], num_bytes: int) -> float:
        """Time of as many ``memmove`` from the source's second pool into ours."""
        src, dst = self._plain_src.ctypes.data, self._plain_dst.ctypes.data
        began = time.monotonic()
        for src_offset, dst_offset in offsets:
            ctypes.memmove(dst + dst_offset, src + src_offset, num_bytes)
        return time.monotonic() - began

    def check(self, src_blocks: np.ndarray, dst_blocks: np.ndarray) -> None:
        """The bytes that arrived are those the source wrote."""
        layout = self.layout
        shape = (layout.num_layers, 2, layout.num_blocks, layout.block_bytes // 8)
        got = np.frombuffer(self.transport.buffer, dtype=np.uint64).reshape(shape)
        first = np.arange(np.prod(shape[:3]), dtype=np.uint64).reshape(shape[:3]) * np.uint64(shape[3])
        assert np.array_equal(got[:, :, dst_blocks, 0], first[:, :, src_blocks])


def measure(name: str, destination: Destination, num_tokens: int, placement: str, repetitions: int) -> Case:
    """Alternate pulls and plain copies of the same number of bytes, alone and queued."""
    layout = destination.layout
    num_blocks = num_tokens // layout.block_size
    num_bytes = num_tokens * layout.token_bytes
    num_queued = min(8, max(1, 64_000_000 // num_bytes))
    rng = np.random.default_rng(num_tokens)

    def somewhere() -> tuple[np.ndarray, np.ndarray]:
        if placement == "contiguous":
            starts = rng.integers(0, layout.num_blocks - num_blocks + 1, 2)
            return np.arange(starts[0], starts[0] + num_blocks), np.arange(starts[1], starts[1] + num_blocks)
        return rng.permutation(layout.num_blocks)[:num_blocks], rng.permutation(layout.num_blocks)[:num_blocks]

    def pair(count: int) -> tuple[float, float]:
        pulls = [somewhere() for _ in range(count)]
        places = rng.integers(0, (layout.num_bytes - num_bytes) // 4096 + 1, (count, 2)) * 4096
        pull = destination.pull_seconds(pulls)
        plain = destination.plain_seconds([(int(src), int(dst)) for src, dst in places], num_bytes)
        destination.check(*pulls[-1])
        return pull, plain

    for _ in range(2):
        pair(num_queued)
    alone, queued = [], []
    for _ in range(repetitions):
        alone.append(pair(1))
        queued.append(pair(num_queued) if num_queued > 1 else alone[-1])
    ratios = sorted(plain / pull for pull, plain in queued)
    return Case(
        name,
        num_tokens,
        placement,
        num_bytes,
        layout.block_bytes * (num_blocks if placement == "contiguous" else 1),
        num_queued,
        num_queued * num_bytes / statistics.median(pull for pull, _ in queued),
        num_queued * num_bytes / statistics.median(plain for _, plain in queued),
        statistics.median(ratios),
        ratios[len(ratios) // 10],
        statistics.median(pull for pull, _ in alone),
        statistics.median(plain / pull for pull, plain in alone),
    )


def measure_overlap(name: str, destination: Destination, pipe: Connection, layer_seconds: float) -> Overlap:
    """Pull 256 tokens, half of them ready, along with steps that take ``layer_seconds`` a layer."""
    blocks = np.arange(256 // destination.layout.block_size)
    lags, cpu, wall = [], 0.0, 0.0
    for step in range(1, 13):
        began, cpu_before = time.monotonic(), time.process_time()
        ended = Ends(1)
        destination.transport.pull(destination.command(blocks, blocks, len(blocks) // 2, step), ended)
        pipe.send((step, layer_seconds))
        source_ended = pipe.recv()
        at = ended.wait()
        wall += time.monotonic() - began
        cpu += time.process_time() - cpu_before
        lags.append(at - source_ended)
    lags = sorted(lags[2:])
    return Overlap(name, layer_seconds, statistics.median(lags), lags[int(len(lags) * 0.9)], cpu / wall)


def table(cases: list[Case], overlaps: list[Overlap]) -> str:
    """The result as Markdown."""
    lines = [
        "| layout | tokens | blocks | MB | piece | pull GB/s | plain GB/s | ratio | P10 | one alone | ratio |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case.layout} | {case.num_tokens} | {case.placement} | {case.num_bytes / 1e6:.1f} "
        f"| {case.piece_bytes / 1024:g} KiB | {case.pull_bandwidth / 1e9:.1f} | {case.plain_bandwidth / 1e9:.1f} "
        f"| {case.ratio:.2f} | {case.low_ratio:.2f} | {case.alone_seconds * 1e3:.2f} ms | {case.alone_ratio:.2f} |"
        for case in cases
    ]
    lines += [
        "",
        "| layout | layer takes | pull ends after the last layer: median | P90 | CPU while waiting |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {o.layout} | {o.layer_seconds * 1e3:g} ms | {o.lag_median * 1e3:.2f} ms | {o.lag_p90 * 1e3:.2f} ms "
        f"| {o.waiting_cpu:.1%} |"
        for o in overlaps
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="what to measure")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096], help="lengths of the prompts")
    parser.add_argument("--repetitions", type=int, default=31, help="pairs of pull and plain copy")
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    options = parser.parse_args()
    cases: list[Case] = []
    overlaps: list[Overlap] = []
    for name in options.layouts:
        most = max(options.tokens) // LAYOUTS[name].block_size
        layout = replace(LAYOUTS[name], num_blocks=max(LAYOUTS[name].num_blocks, most * 5 // 4))
        pipe, theirs = multiprocessing.Pipe()
        source = multiprocessing.get_context("spawn").Process(target=source_process, args=(theirs, layout))
        source.start()
        destination = Destination(layout, *pipe.recv())
        for num_tokens in options.tokens:
            for placement in ("contiguous", "scattered"):
                cases.append(measure(name, destination, num_tokens, placement, options.repetitions))
                print(table(cases[-1:], []).splitlines()[2], flush=True)
        overlaps.extend(measure_overlap(name, destination, pipe, seconds) for seconds in (0.002, 0.02))
        pipe.send(None)
        source.join()
        destination.close()
    print("\n" + table(cases, overlaps))
    if options.output is not None:
        result = {
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "cases": [asdict(case) for case in cases],
            "overlap": [asdict(overlap) for overlap in overlaps],
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
