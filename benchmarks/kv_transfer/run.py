"""Measures pulls of KV between two processes against a plain copy of the same bytes between the same processes.

    python benchmarks/kv_transfer/run.py --output benchmarks/kv_transfer/result.json

The source is a process of its own. The plain copy is one ``memmove`` of contiguous bytes out of a second mapping of
that process's memory into a second pool, allocated, advised and populated exactly as the KV pools are. Both are timed
in this process, alternating, over regions that change from one repetition to the next; a pull counts from the call to
its completion callback. ``scattered`` puts every block of a pull at a random place on both sides, so each piece is one
block's keys (or values) of one layer; ``contiguous`` is one run of blocks.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import queue
import statistics
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
    "demo": KvLayout(num_layers=4, num_blocks=1024, block_size=16, num_kv_heads=2, head_dim=32, dtype="bfloat16"),
    "768": KvLayout(num_layers=12, num_blocks=1024, block_size=16, num_kv_heads=4, head_dim=64, dtype="bfloat16"),
    "8B": KvLayout(num_layers=32, num_blocks=384, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}
"""The embedded demo model, the 768-hidden model of the CPU comparison, and Llama-3-8B."""


@dataclass(frozen=True)
class Case:
    """Medians of one layout, size and placement; seconds and bytes."""

    layout: str
    num_tokens: int
    placement: str
    num_bytes: int
    piece_bytes: int
    pull_seconds: float
    plain_seconds: float
    ratio: float
    """Bandwidth of the pull over that of the plain copy: median of the paired ratios."""
    worst_ratio: float
    """10th percentile of the paired ratios."""


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

    def start(self, src_blocks: np.ndarray, dst_blocks: np.ndarray, num_ready: int, step: int) -> queue.SimpleQueue:
        """Start a pull; its end and the time of that arrive in the queue."""
        ended: queue.SimpleQueue[tuple[float, Migrated]] = queue.SimpleQueue()
        self._pull_id += 1
        migrate = Migrate(
            self._pull_id,
            ("request", 0),
            "source",
            tuple(src_blocks.tolist()),
            tuple(dst_blocks.tolist()),
            num_ready,
            step,
            time.monotonic() + 60,
        )
        self.transport.pull(migrate, lambda event: ended.put((time.monotonic(), event)))
        return ended

    def pull_seconds(self, src_blocks: np.ndarray, dst_blocks: np.ndarray) -> float:
        """Time from the call to the callback of a pull of blocks that are all ready."""
        began = time.monotonic()
        at, event = self.start(src_blocks, dst_blocks, len(src_blocks), 0).get()
        assert event.ok, event.reason
        return at - began

    def plain_seconds(self, src_offset: int, dst_offset: int, num_bytes: int) -> float:
        """Time of one ``memmove`` from the source's second pool into ours."""
        src, dst = self._plain_src.ctypes.data + src_offset, self._plain_dst.ctypes.data + dst_offset
        began = time.monotonic()
        ctypes.memmove(dst, src, num_bytes)
        return time.monotonic() - began

    def check(self, src_blocks: np.ndarray, dst_blocks: np.ndarray) -> None:
        """The bytes that arrived are those the source wrote."""
        layout = self.layout
        shape = (layout.num_layers, 2, layout.num_blocks, layout.block_bytes // 8)
        got = np.frombuffer(self.transport.buffer, dtype=np.uint64).reshape(shape)
        first = np.arange(np.prod(shape[:3]), dtype=np.uint64).reshape(shape[:3]) * np.uint64(shape[3])
        assert np.array_equal(got[:, :, dst_blocks, 0], first[:, :, src_blocks])


def measure(name: str, destination: Destination, num_tokens: int, placement: str, repetitions: int) -> Case:
    """Alternate pulls and plain copies of the same number of bytes."""
    layout = destination.layout
    num_blocks = num_tokens // layout.block_size
    num_bytes = num_tokens * layout.token_bytes
    rng = np.random.default_rng(num_tokens)
    pulls, plains = [], []
    for repetition in range(repetitions + 2):
        if placement == "contiguous":
            starts = rng.integers(0, layout.num_blocks - num_blocks + 1, 2)
            src_blocks, dst_blocks = (np.arange(start, start + num_blocks) for start in starts)
        else:
            src_blocks, dst_blocks = (rng.permutation(layout.num_blocks)[:num_blocks] for _ in range(2))
        offsets = rng.integers(0, (layout.num_bytes - num_bytes) // 4096 + 1, 2) * 4096
        pull = destination.pull_seconds(src_blocks, dst_blocks)
        plain = destination.plain_seconds(int(offsets[0]), int(offsets[1]), num_bytes)
        destination.check(src_blocks, dst_blocks)
        if repetition >= 2:
            pulls.append(pull)
            plains.append(plain)
    ratios = sorted(plain / pull for plain, pull in zip(plains, pulls, strict=True))
    piece_bytes = layout.block_bytes * (num_blocks if placement == "contiguous" else 1)
    return Case(
        name,
        num_tokens,
        placement,
        num_bytes,
        piece_bytes,
        statistics.median(pulls),
        statistics.median(plains),
        statistics.median(ratios),
        ratios[len(ratios) // 10],
    )


def measure_overlap(name: str, destination: Destination, pipe: Connection, layer_seconds: float) -> Overlap:
    """Pull 256 tokens, half of them ready, along with steps that take ``layer_seconds`` a layer."""
    blocks = np.arange(256 // destination.layout.block_size)
    lags, cpu, wall = [], 0.0, 0.0
    for step in range(1, 13):
        began, cpu_before = time.monotonic(), time.process_time()
        ended = destination.start(blocks, blocks, len(blocks) // 2, step)
        pipe.send((step, layer_seconds))
        source_ended = pipe.recv()
        at, event = ended.get()
        assert event.ok, event.reason
        wall += time.monotonic() - began
        cpu += time.process_time() - cpu_before
        lags.append(at - source_ended)
    lags = sorted(lags[2:])
    return Overlap(name, layer_seconds, statistics.median(lags), lags[int(len(lags) * 0.9)], cpu / wall)


def table(cases: list[Case], overlaps: list[Overlap]) -> str:
    """The result as Markdown."""
    lines = [
        "| layout | tokens | placement | MB | piece | pull GB/s | plain GB/s | ratio | 10th percentile |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case.layout} | {case.num_tokens} | {case.placement} | {case.num_bytes / 1e6:.1f} "
        f"| {case.piece_bytes / 1024:g} KiB | {case.num_bytes / case.pull_seconds / 1e9:.1f} "
        f"| {case.num_bytes / case.plain_seconds / 1e9:.1f} | {case.ratio:.2f} | {case.worst_ratio:.2f} |"
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
    cases, overlaps = [], []
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
