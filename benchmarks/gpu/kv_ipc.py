"""KV from one process to another on one card, against a copy within the card.

    python -m benchmarks.gpu.kv_ipc --output benchmarks/gpu/results/kv_ipc.json

The KV of a prompt of an 8B Llama (32 layers, 8 KV heads of 128, bfloat16, blocks of 16 tokens at random places) is
pulled out of the memory of another process and timed as an instance sees it: from its order to its end, with planning,
launch and looking. Beside each pull, torch copies as many bytes within the card, launch and wait included. The
ratio is the median over pairs. Needs one card with 6 GB free, and torch for CUDA.
"""

import argparse
import json
import multiprocessing
import queue
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.gpu.card import describe_run
from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.cuda_ipc.cuda import CudaDevice
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport

LLAMA_8B = KvLayout(num_layers=32, num_blocks=600, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
WANTED = 0.7
_SECRET = b"benchmark"
_PATIENCE = 60.0

OpenDevice = Callable[[], Device]


@dataclass(frozen=True, slots=True)
class Pulled:
    """Medians for ``num_prompts`` of ``num_tokens`` each, pulled at once.

    ``num_bytes`` of all; seconds of the pulls and of a device copy, and the median of copy over pulls.
    """

    num_tokens: int
    num_prompts: int
    num_bytes: int
    pull_seconds: float
    copy_seconds: float
    ratio: float


def open_card() -> Device:
    """The first GPU."""
    return CudaDevice(0)


def measure(
    open_device: OpenDevice, layout: KvLayout, loads: Sequence[tuple[int, int]], repetitions: int
) -> list[Pulled]:
    """Pull ``loads`` (tokens of a prompt, prompts at once) out of a process that this one starts; checks the bytes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    source = context.Process(target=_serve, args=(open_device, layout, theirs), daemon=True)
    source.start()
    sink = _transport(open_device(), layout)
    try:
        sink.connect("source", ours.recv())
        return [_pull(sink, layout, *load, repetitions) for load in loads]
    finally:
        sink.close()
        ours.send("end")
        source.join()


def _pull(sink: CudaIpcTransport, layout: KvLayout, num_tokens: int, num_prompts: int, repetitions: int) -> Pulled:
    num_blocks = -(-num_tokens // layout.block_size)
    ended: queue.SimpleQueue[Migrated] = queue.SimpleQueue()
    num_bytes = num_prompts * num_blocks * layout.block_size * layout.token_bytes
    left, right = (torch.zeros(num_bytes, dtype=torch.uint8, device=sink.pool.device) for _ in range(2))
    pairs = []
    for repetition in range(repetitions + 1):
        src, dst = (random.sample(range(layout.num_blocks), num_prompts * num_blocks) for _ in range(2))
        orders = []
        for prompt in range(num_prompts):
            blocks = slice(prompt * num_blocks, (prompt + 1) * num_blocks)
            pull_id, deadline = repetition * num_prompts + prompt, time.time() + _PATIENCE
            theirs, ours = tuple(src[blocks]), tuple(dst[blocks])
            orders.append(Migrate(pull_id, ("r", 0), "source", theirs, ours, num_blocks, 0, deadline))
        start = time.perf_counter()
        for order in orders:
            sink.pull(order, ended.put)
        events = [ended.get(timeout=_PATIENCE) for _ in orders]
        pull_seconds = time.perf_counter() - start
        if failure := next((event.reason for event in events if not event.ok), ""):
            raise TransferError(failure)
        pairs.append((pull_seconds, _seconds(lambda: left.copy_(right))))
        _check(sink.pool, layout, src, dst)
    # The first is to warm up.
    pulls, copies = zip(*pairs[1:], strict=True)
    ratios = [copy / pull for pull, copy in pairs[1:]]
    return Pulled(
        num_tokens,
        num_prompts,
        num_bytes,
        statistics.median(pulls),
        statistics.median(copies),
        statistics.median(ratios),
    )


def _serve(open_device: OpenDevice, layout: KvLayout, connection: Connection) -> None:
    transport = _transport(open_device(), layout)
    _blocks(transport.pool, layout).copy_(_pattern(layout).to(transport.pool.device)[None, None, :, None])
    _synchronize(transport.pool)
    connection.send(transport.address)
    connection.recv()
    transport.close()


def _transport(device: Device, layout: KvLayout) -> CudaIpcTransport:
    def lost(error: TransferError) -> None:
        raise error

    return CudaIpcTransport(layout, device=device, secret=_SECRET, clock=time.time, on_lost=lost)


def _check(pool: torch.Tensor, layout: KvLayout, src: Sequence[int], dst: Sequence[int]) -> None:
    arrived = _blocks(pool, layout)[:, :, list(dst)]
    expected = _pattern(layout)[list(src)].to(pool.device)
    if not bool((arrived == expected[None, None, :, None]).all()):
        raise TransferError("other bytes arrived than were sent")


def _blocks(pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    return pool.view(layout.num_layers, 2, layout.num_blocks, -1)


def _pattern(layout: KvLayout) -> torch.Tensor:
    """A byte for each block of the source."""
    return (torch.arange(layout.num_blocks) % 251 + 1).to(torch.uint8)


def _seconds(call: Callable[[], object]) -> float:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _synchronize(pool: torch.Tensor) -> None:
    if pool.is_cuda:
        torch.cuda.synchronize(pool.device)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="KV between two processes on one card, against a copy within it.")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--repetitions", type=int, default=50, help="pulls per length (default 50)")
    arguments = parser.parse_args()
    rows = measure(open_card, LLAMA_8B, ((256, 1), (2048, 1), (2048, 4), (8192, 1)), arguments.repetitions)
    for row in rows:
        figures = f"pull {1e3 * row.pull_seconds:.3f} ms, device copy {1e3 * row.copy_seconds:.3f} ms, {row.ratio:.2f}"
        sys.stdout.write(f"{row.num_prompts} x {row.num_tokens} tokens, {row.num_bytes / 2**20:.0f} MiB: {figures}\n")
    sys.stdout.write(f"wanted at 2048 tokens: {WANTED:.2f} of the device copy's rate\n")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        facts = describe_run("benchmarks.gpu.kv_ipc", torch.device("cuda", 0))
        written = {"run": facts, "rows": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
