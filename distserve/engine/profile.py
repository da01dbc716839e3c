"""Times the engine's own prefill and decode steps over a grid of shapes, on this machine, alone.

Measures and nothing else: what follows from the times is :mod:`distserve.core.profile`'s business. Steps go through
:class:`distserve.engine.worker.Worker` exactly as an instance's do, over KV blocks of their own for every sequence; the
values in the cache do not matter to the time. Each visit of a point opens fresh sequences, so that a prompt's step pays
for making its batch as it does in service; a decode batch is visited for several steps, of which the first pays for it.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.latency import StepShape
from distserve.core.profile import Measurement
from distserve.core.request import Request, SamplingParams
from distserve.engine.worker import Worker

_DECODE_STEPS = 6
"""Steps per visit of a decode batch: blocks of 16 tokens are taken in part of the visits, as in service."""
_PAUSE = 0.05
"""Seconds before a step of prompts alone. Below saturation a prefill instance is idle between prompts, and caches have
forgotten some of the weights when the next one comes: 2% to 5% of a step on a CPU. Decoding does not pause."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Which steps are measured; lengths in tokens.

    ``decode``: (sequences, cached tokens of each). ``prefill``: (prompts, new tokens of each, cached tokens of each).
    ``mixed``: (decoding sequences, cached tokens of each, prompt tokens of one chunk, cached tokens of its prompt).
    """

    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int, int], ...]
    mixed: tuple[tuple[int, int, int, int], ...]

    def __len__(self) -> int:
        return len(self.decode) + len(self.prefill) + len(self.mixed)


def make_grid(max_batch_tokens: int, max_batch_size: int, max_model_len: int, *, quick: bool = False) -> Grid:
    """A grid over what a scheduler within these limits can ask for; ``quick`` thins it out for a rehearsal."""
    batches = _steps(1, max_batch_size, 4 if quick else 2)
    contexts = [
        c for c in ((64, 512) if quick else (32, 128, 256, 512, 1024, 2048)) if c + _DECODE_STEPS <= max_model_len
    ]
    contexts = contexts or [max(1, max_model_len // 2)]
    tokens = [t for t in _steps(2, max_batch_tokens, 4 if quick else 2) if t < max_model_len]
    if not quick:
        # Between powers of two the tiles of matrix multiplications are partly filled.
        tokens = sorted({*tokens, *(3 * t // 2 for t in tokens if 3 * t // 2 <= min(max_batch_tokens, max_model_len))})
    prefill = [(1, num, 0) for num in tokens]
    prefill += [(n, num // n, 0) for num in tokens for n in (2, 4, 8) if num // n >= 8 and num >= max_batch_tokens // 4]
    top = tokens[-1]
    prefill += [(1, num, c) for num in {top, top // 4} for c in (top, 2 * top) if num > 1 and num + c <= max_model_len]
    mixed = [
        (b, c, num, 0)
        for b in batches[1::2]
        for num in (*tokens[2 :: 4 if quick else 2], top // 2 + top // 4, max_batch_tokens - b)
        for c in contexts[: 1 if quick else 2]
        if b + num <= max_batch_tokens and 0 < num < max_model_len
    ]
    return Grid(tuple((b, c) for b in batches for c in contexts), tuple(prefill), tuple(mixed))


def _steps(low: int, high: int, factor: int) -> list[int]:
    """``low``, times ``factor`` again and again, up to ``high``, which is included."""
    values = []
    while low < high:
        values.append(low)
        low *= factor
    return [*values, high]


@dataclass(frozen=True, slots=True)
class _Point:
    decodes: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]

    def num_tokens(self) -> Iterator[int]:
        """Tokens whose KV each sequence needs."""
        for cached in self.decodes:
            yield cached + _DECODE_STEPS
        for num_tokens, cached in self.prompts:
            yield cached + num_tokens

    @property
    def first_shape(self) -> StepShape:
        return StepShape(
            num_prefill_tokens=sum(num for num, _ in self.prompts),
            prefill_pairs=sum(num * (2 * cached + num + 1) // 2 for num, cached in self.prompts),
            num_decodes=len(self.decodes),
            decode_context=sum(cached + 1 for cached in self.decodes),
            num_prefills=len(self.prompts),
        )


def measure(
    worker: Worker, grid: Grid, *, num_rounds: int, on_progress: Callable[[int, int], None]
) -> list[Measurement]:
    """Visit every point of ``grid`` ``num_rounds`` times, in a new order each time, after a round that does not count.

    Points whose sequences do not fit ``worker``'s KV memory are left out. ``on_progress(visits made, visits in all)``.
    """
    kv = worker.layout
    points = [
        point
        for point in dict.fromkeys(_points(grid))
        if sum(-(-num // kv.block_size) for num in point.num_tokens()) <= kv.num_blocks
    ]
    stepper = _Stepper(worker)
    firsts: dict[_Point, list[float]] = {point: [] for point in points}
    nexts: dict[_Point, list[float]] = {point: [] for point in points}
    order = random.Random(0)
    total = len(points) * (num_rounds + 1)
    done = 0
    for round_number in range(num_rounds + 1):
        order.shuffle(points)
        for point in points:
            first, rest = stepper.visit(point)
            if round_number > 0:
                firsts[point].append(first)
                nexts[point].extend(rest)
            done += 1
            on_progress(done, total)
    ordered = [point for point in dict.fromkeys(_points(grid)) if point in firsts]
    return [_summary(point, firsts[point], nexts[point]) for point in ordered]


def _points(grid: Grid) -> Iterator[_Point]:
    for batch, cached in grid.decode:
        yield _Point((cached,) * batch, ())
    for count, num_tokens, cached in grid.prefill:
        yield _Point((), ((num_tokens, cached),) * count)
    for batch, context, num_tokens, cached in grid.mixed:
        yield _Point((context,) * batch, ((num_tokens, cached),))


def _summary(point: _Point, firsts: Sequence[float], nexts: Sequence[float]) -> Measurement:
    shape = point.first_shape
    if not nexts:
        return Measurement(shape, median(firsts), min(firsts), len(firsts))
    # The middle of the visits' later steps stands for all of them: the context grows by a token a step.
    grown = len(point.decodes) * _DECODE_STEPS // 2
    shape = StepShape(num_decodes=shape.num_decodes, decode_context=shape.decode_context + grown)
    return Measurement(shape, median(nexts), min(nexts), len(nexts), change=median(firsts) - median(nexts))


class _Stepper:
    """Runs visits: sequences opened, stepped and closed again, their blocks handed out in a shuffled order."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._random = random.Random(1)
        self._blocks = list(range(worker.layout.num_blocks))
        self._random.shuffle(self._blocks)
        self._next_id = 0
        self._step_id = 0

    def visit(self, point: _Point) -> tuple[float, list[float]]:
        """Seconds of the first step over the point's sequences, and of those after it if it is a decode batch."""
        blocks = iter(self._blocks)
        size = self._worker.layout.block_size
        chunks, tables = [], []
        for num_tokens, cached in ((1, cached) for cached in point.decodes):
            seq_id, table = self._open(cached, num_tokens, cached + _DECODE_STEPS, blocks, size, is_decode=True)
            chunks.append(Chunk(seq_id, 1, samples=True))
            tables.append(table)
        for num_tokens, cached in point.prompts:
            seq_id, table = self._open(cached, num_tokens, cached + num_tokens, blocks, size, is_decode=False)
            chunks.append(Chunk(seq_id, num_tokens, samples=True))
            tables.append(table)
        batch = tuple(chunks)
        if not point.decodes:
            time.sleep(_PAUSE)
        first = self._step(batch, tuple(tables))
        # A chunk's tokens are known only once: a batch with prompts in it is stepped once.
        rest = [] if point.prompts else [self._step(batch, ()) for _ in range(_DECODE_STEPS - 1)]
        for chunk in chunks:
            self._worker.close(chunk.seq_id)
        return first, rest

    def _open(
        self, cached: int, num_tokens: int, capacity: int, blocks: Iterator[int], size: int, *, is_decode: bool
    ) -> tuple[int, TableUpdate]:
        self._next_id += 1
        vocabulary = self._worker.description.vocab_size
        known = [self._random.randrange(vocabulary) for _ in range(cached + num_tokens)]
        prompt, output = (known[:-1], known[-1:]) if is_decode else (known, [])
        params = SamplingParams(max_tokens=_DECODE_STEPS + 1, temperature=0.0, ignore_eos=True)
        request = Request(f"profile-{self._next_id}", "profile", tuple(prompt), params)
        self._worker.open(OpenSequence(self._next_id, request, (0,), tuple(output), cached))
        taken = tuple(next(blocks) for _ in range(-(-capacity // size)))
        return self._next_id, TableUpdate(self._next_id, 0, taken)

    def _step(self, chunks: tuple[Chunk, ...], tables: tuple[TableUpdate, ...]) -> float:
        self._step_id += 1
        step = RunStep(self._step_id, chunks, tables)
        start = time.perf_counter()
        self._worker.run(step, _layer_done)
        return time.perf_counter() - start


def _layer_done(layer: int) -> None:
    """Stands for the transport: a step that announces its layers runs them in groups."""
