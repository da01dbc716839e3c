"""KV between two ranks by NCCL, on one card: how fast, what it costs a decode beside it, how far it overlaps a prefill.

    python -m benchmarks.gpu.nccl_transfer --output benchmarks/gpu/results/h200-nccl

needs one CUDA card with about 8 GB free and CuPy (``pip install -e '.[cuda]'``), and takes about a minute. Both
ranks are in this process and NCCL's communicator has one rank, which sends to itself: the card's memory does the work
of both ends, so figures between two cards are better where the link is not what bounds them.

``--dry-run`` rehearses it on a CPU with tiny shapes and without NCCL; its figures mean nothing.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.card import describe_run
from benchmarks.gpu.rows import Row, table
from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.events import Migrated
from distserve.transfer.nccl.collectives import Collectives, Communicator
from distserve.transfer.nccl.cupy_nccl import CupyCollectives, CupyCommunicator
from distserve.transfer.nccl.device import Completion, device_of
from distserve.transfer.nccl.loopback import CopyExchanger, LoopbackCollectives
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.transport import NcclTransport

LIMITS = Limits(transfer_timeout=30.0)


@dataclass(frozen=True)
class Sizes:
    """What is moved and computed; layers are as wide as an 8B Llama's by default."""

    layout: KvLayout
    prompt_tokens: int = 2048
    width: int = 4096
    inner: int = 14336
    decode_batch: int = 16
    decode_steps: int = 32


EIGHT_B = Sizes(KvLayout(32, 1024, 16, 8, 128, "bfloat16"))
TINY = Sizes(KvLayout(4, 32, 4, 2, 16, "bfloat16"), prompt_tokens=32, width=32, inner=64, decode_steps=2)


class _TimedCollectives:
    """Another library, with the time at which each receive was launched and seen to have ended."""

    def __init__(self, inner: Collectives) -> None:
        self.version = inner.version
        self._inner = inner
        self.received: list[list[float]] = []

    def unique_id(self) -> bytes:
        return self._inner.unique_id()

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> Communicator:
        return _TimedCommunicator(self._inner.communicator(unique_id, rank, num_ranks), self.received)


@dataclass
class _TimedCommunicator:
    inner: Communicator
    received: list[list[float]]

    def send(self, memory: Tensor) -> Completion:
        return self.inner.send(memory)

    def recv(self, memory: Tensor) -> Completion:
        started = time.perf_counter()
        return _TimedCompletion(self.inner.recv(memory), started, self.received)

    def check(self) -> None:
        self.inner.check()

    def abort(self) -> None:
        self.inner.abort()

    def destroy(self) -> None:
        self.inner.destroy()


@dataclass
class _TimedCompletion:
    inner: Completion
    started: float
    received: list[list[float]]
    is_noted: bool = False

    def query(self) -> bool:
        has_ended = self.inner.query()
        if has_ended and not self.is_noted:
            self.is_noted = True
            self.received.append([self.started, time.perf_counter()])
        return has_ended


@dataclass
class Pair:
    """A source and a destination on one device."""

    sizes: Sizes
    device: torch.device
    version: str = ""
    received: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = self.sizes.layout
        self.pools = [torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.pools[0].random_(1, 256)
        timed = _TimedCollectives(_library(self.pools[0], self.device))
        self.received, self.version = timed.received, timed.version
        self.source, self.sink = (
            NcclTransport(
                layout,
                pool,
                host="127.0.0.1",
                secret=b"benchmark",
                clock=time.monotonic,
                limits=LIMITS,
                collectives=timed,
            )
            for pool in self.pools
        )
        self.sink.connect("source", self.source.address)
        generator = torch.Generator().manual_seed(0)
        num_blocks = -(-self.sizes.prompt_tokens // layout.block_size)
        order = torch.randperm(layout.num_blocks, generator=generator).tolist()
        self.src_blocks = tuple(order[:num_blocks])
        self.dst_blocks = tuple(reversed(order[:num_blocks]))
        self.num_bytes = num_blocks * layout.block_size * layout.token_bytes
        self._num_pulls = 0

    def begin(self, *, follows: int | None = None) -> Callable[[], Migrated]:
        """Start a pull of a prompt, ready or following a step; return what waits for its end."""
        self._num_pulls += 1
        ended = threading.Event()
        events: list[Migrated] = []

        def done(event: Migrated) -> None:
            events.append(event)
            ended.set()

        num_ready = len(self.src_blocks) if follows is None else 0
        key = (f"r{self._num_pulls}", 0)
        deadline = time.monotonic() + 120
        blocks = self.src_blocks, self.dst_blocks
        self.sink.pull(Migrate(self._num_pulls, key, "source", *blocks, num_ready, follows or 0, deadline), done)

        def wait() -> Migrated:
            ended.wait()
            if not events[0].ok:
                raise RuntimeError(f"the pull failed: {events[0].reason}")
            return events[0]

        return wait

    def check(self) -> None:
        """Pull once, and compare."""
        self.begin()()
        theirs, ours = (pool.view(torch.bfloat16).view(self.sizes.layout.shape) for pool in self.pools)
        sent, arrived = theirs[:, :, list(self.src_blocks)], ours[:, :, list(self.dst_blocks)]
        if not torch.equal(sent.view(torch.int16), arrived.view(torch.int16)):
            raise RuntimeError("what arrived is not what was sent")

    def close(self) -> None:
        """End both."""
        self.sink.close()
        self.source.close()


def _library(pool: Tensor, device: torch.device) -> Collectives:
    if device.type != "cuda":
        return LoopbackCollectives(CopyExchanger)
    cupy = CupyCollectives(device_of(pool))

    def make() -> CupyCommunicator:
        return cupy.communicator(cupy.unique_id(), rank=0, num_ranks=1)

    return LoopbackCollectives(make, cupy.version)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - started


def measure_rate(pair: Pair, repetitions: int) -> list[Row]:
    """Prompts one by one, and four at once, against a device copy of as many bytes."""
    out, into = (torch.empty(pair.num_bytes, dtype=torch.uint8, device=pair.device) for _ in range(2))

    def one() -> None:
        pair.begin()()

    def four() -> None:
        for wait in [pair.begin() for _ in range(4)]:
            wait()

    rows = []
    for what, pull, num_prompts, wanted in (
        ("one prompt at a time", one, 1, None),
        ("four prompts at once", four, 4, 0.70),
    ):
        pairs = [
            (_timed(pull, pair.device) / num_prompts, _timed(lambda: into.copy_(out), pair.device))
            for _ in range(repetitions)
        ]
        seconds, ceiling = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(copy / mine for mine, copy in pairs)
        name = f"KV of {pair.sizes.prompt_tokens} tokens by NCCL, {what}"
        rate, best = pair.num_bytes / seconds, pair.num_bytes / ceiling
        rows.append(Row(name, rate, best, "B/s", "device copy", ratio, wanted))
    return rows


class Layers:
    """Work as a model's layers have it: matrices as wide as an 8B Llama's, random numbers."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        options: Any = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32, "device": device}
        self._num_layers = sizes.layout.num_layers
        self._up = torch.randn(sizes.width, sizes.inner, **options)
        self._down = torch.randn(sizes.inner, sizes.width, **options) / sizes.inner
        self._decoding = torch.randn(sizes.decode_batch, sizes.width, **options)
        self._prompt = torch.randn(sizes.prompt_tokens, sizes.width, **options)

    def decode(self) -> None:
        """A step: every layer's matrices are read once."""
        for _ in range(self._num_layers):
            self._decoding @ self._up @ self._down

    def prefill(self, layer_done: Callable[[int], None]) -> None:
        """A prompt's step, twice the matrices of a layer, so that it takes about as long as with attention."""
        for layer in range(self._num_layers):
            for _ in range(2):
                self._prompt @ self._up @ self._down
            layer_done(layer)


def measure_decode(pair: Pair, layers: Layers, repetitions: int) -> Row:
    """Decode steps alone, and while prompts arrive without a pause."""

    def steps() -> None:
        for _ in range(pair.sizes.decode_steps):
            layers.decode()

    def beside() -> float:
        stopping = threading.Event()

        def receive() -> None:
            while not stopping.is_set():
                for wait in [pair.begin(), pair.begin()]:
                    wait()

        thread = threading.Thread(target=receive)
        thread.start()
        time.sleep(0.02)
        started = time.perf_counter()
        steps()
        if pair.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        seconds = time.perf_counter() - started
        stopping.set()
        thread.join()
        return seconds

    steps()
    pairs = [(_timed(steps, pair.device), beside()) for _ in range(repetitions)]
    alone, slowed = (statistics.median(times) / pair.sizes.decode_steps for times in zip(*pairs, strict=True))
    ratio = statistics.median(mine / other for mine, other in pairs)
    what = f"decode steps of batch {pair.sizes.decode_batch} while KV arrives (both ends on this card)"
    batch = pair.sizes.decode_batch
    return Row(what, batch / slowed, batch / alone, "tokens/s", "the same alone", ratio, 1 / 1.10)


def measure_overlap(pair: Pair, layers: Layers) -> dict[str, Any]:
    """A prompt's step and the pull that follows it: when layers were passed and pieces arrived, in seconds."""
    layers.prefill(lambda _: None)
    _wait(pair.device)
    del pair.received[:]
    passed: list[tuple[int, Completion]] = []
    times: list[float] = []
    device = device_of(pair.pools[0])
    wait = pair.begin(follows=1)
    started = time.perf_counter()
    pair.source.begin_step(1)

    def layer_done(layer: int) -> None:
        pair.source.layer_done(1, layer)
        passed.append((layer, device.record()))

    layers.prefill(layer_done)
    pair.source.end_step(1)
    for _, completion in passed:
        while not completion.query():
            time.sleep(20e-6)
        times.append(time.perf_counter() - started)
    wait()
    end = time.perf_counter() - started
    pieces = [[begin - started, stop - started] for begin, stop in pair.received]
    return {
        "layers_passed": times,
        "pieces_received": pieces,
        "pull_ended": end,
        "tail": end - times[-1],
        "share_before_last_layer": sum(stop <= times[-1] for _, stop in pieces) / len(pieces),
    }


def draw(overlap: dict[str, Any], width: int = 72) -> str:
    """The timeline in text: one line for the layers, one per piece."""
    scale = width / overlap["pull_ended"]

    def bar(begin: float, end: float, mark: str) -> str:
        first = min(int(begin * scale), width - 1)
        return " " * first + mark * max(1, int(end * scale) - first)

    marks = [" "] * width
    for moment in overlap["layers_passed"]:
        marks[min(int(moment * scale), width - 1)] = "|"
    lines = [f"layers  {''.join(marks)}"]
    lines += [f"piece   {bar(begin, end, '=')}" for begin, end in overlap["pieces_received"]]
    end, tail = overlap["pull_ended"] * 1e3, overlap["tail"] * 1e3
    lines.append(f"        0 to {end:.1f} ms; the last layer was passed {tail:.1f} ms before the end")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="KV between two ranks by NCCL, on one card.")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU: tiny shapes, no NCCL, times void")
    parser.add_argument("--output", type=Path, help="where to write OUTPUT.md and OUTPUT.json")
    parser.add_argument("--repetitions", type=int, default=20, help="pairs timed per row (default 20)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run rehearses without one")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    sizes = TINY if options.dry_run else EIGHT_B
    repetitions = 2 if options.dry_run else options.repetitions
    facts = {**describe_run("benchmarks.gpu.nccl_transfer", device), "dry": options.dry_run}
    torch.manual_seed(0)
    pair = Pair(sizes, device)
    try:
        facts["nccl"] = pair.version
        pair.check()
        rows = measure_rate(pair, repetitions)
        layers = Layers(sizes, device)
        rows.append(measure_decode(pair, layers, repetitions))
        overlap = measure_overlap(pair, layers)
    finally:
        pair.close()
    print(table(rows))
    print(draw(overlap))
    if options.dry_run:
        print("A rehearsal on the CPU: the figures mean nothing.")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        said = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        text = f"# KV by NCCL on one card\n\n{said}\n\n{table(rows)}\n\n```\n{draw(overlap)}\n```\n"
        options.output.with_suffix(".md").write_text(text)
        written = {"run": facts, "rows": [asdict(row) for row in rows], "overlap": overlap}
        options.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
