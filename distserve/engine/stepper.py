"""Runs steps of made-up sequences on an engine and times them: what :mod:`distserve.engine.profile` measures with.

Steps go through the engine exactly as an instance's do, over KV blocks of their own for every sequence; the values in
the cache do not matter to the time. Each visit opens fresh sequences, so that a prompt's step pays for making its batch
as it does in service; a decode batch is visited for several steps, of which the first pays for it.

A pipeline is visited full and empty: how far apart steps end that follow each other closely is what its busiest stage
takes, and one step alone in it takes what a token has to wait at least.
"""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.events import StepDone, StepFailed
from distserve.core.latency import StepShape
from distserve.core.request import Request, SamplingParams
from distserve.engine.group.driver import RankGroup
from distserve.engine.worker import Worker

DECODE_STEPS = 6
"""Steps per visit of a decode batch: blocks of 16 tokens are taken in part of the visits, as in service."""
_ALONE_STEPS = 3
"""Of which this many go through an empty pipeline, where there is one; the others follow each other closely."""
_PAUSE = 0.05
"""Seconds before a step of prompts alone. Below saturation a prefill instance is idle between prompts, and caches have
forgotten some of the weights when the next one comes: 2% to 5% of a step on a CPU. Decoding does not pause."""
_LOOK_EVERY = 0.1
"""Seconds after which an instance that has not answered is looked after."""


@dataclass(frozen=True, slots=True)
class Point:
    """A step to be timed: cached tokens of each decoding sequence; (new tokens, cached tokens) of each prompt."""

    decodes: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]

    def num_tokens(self) -> Iterator[int]:
        """Tokens whose KV each sequence needs."""
        for cached in self.decodes:
            yield cached + DECODE_STEPS
        for num_tokens, cached in self.prompts:
            yield cached + num_tokens

    @property
    def first_shape(self) -> StepShape:
        """The shape of the first step of a visit."""
        return StepShape(
            num_prefill_tokens=sum(num for num, _ in self.prompts),
            prefill_pairs=sum(num * (2 * cached + num + 1) // 2 for num, cached in self.prompts),
            num_decodes=len(self.decodes),
            decode_context=sum(cached + 1 for cached in self.decodes),
            num_prefills=len(self.prompts),
        )


@dataclass(slots=True)
class Times:
    """Seconds of steps: the ``first`` ones of visits, the ``later`` ones of decode batches.

    ``apart`` is how far apart the ends of steps were that followed each other through a full pipeline.
    """

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Open sequences that are stepped together, and the tables of their first step."""

    chunks: tuple[Chunk, ...]
    tables: tuple[TableUpdate, ...]


class Stepper:
    """Makes visits: sequences opened, stepped and closed again, their blocks handed out in a shuffled order."""

    def __init__(self, engine: Worker | RankGroup) -> None:
        self._engine = engine
        self._num_stages = engine.parallel.pp if isinstance(engine, RankGroup) else 1
        self._random = random.Random(1)
        self._blocks = list(range(engine.layout.num_blocks))
        self._random.shuffle(self._blocks)
        self._next_id = 0
        self._step_id = 0

    def has_room(self, point: Point) -> bool:
        """Whether the KV memory holds the point's sequences."""
        layout = self._engine.layout
        return sum(-(-num // layout.block_size) for num in point.num_tokens()) <= layout.num_blocks

    def visit(self, point: Point, times: Times) -> None:
        """Step the point's sequences, and add to ``times`` what it took."""
        # Where memory is short, batches that fill a pipeline share blocks, as the values in them do not matter.
        blocks = cycle(self._blocks)
        batch = self._open_batch(point, blocks)
        if not point.decodes:
            time.sleep(_PAUSE)
        times.first.append(self._step(batch.chunks, batch.tables))
        # A chunk's tokens are known only once: a batch with prompts in it is stepped once.
        num_later = 0 if point.prompts else (DECODE_STEPS if self._num_stages == 1 else _ALONE_STEPS) - 1
        times.later += [self._step(batch.chunks, ()) for _ in range(num_later)]
        self._close(batch)
        if self._num_stages > 1:
            times.apart.append(self._fill_pipeline(point, blocks))

    def _fill_pipeline(self, point: Point, blocks: Iterator[int]) -> float:
        """Mean seconds between the ends of steps, with one more on its way than the pipeline has stages."""
        assert isinstance(self._engine, RankGroup)
        engine = self._engine
        batches = [self._open_batch(point, blocks) for _ in range(self._num_stages + 1)]
        num_rounds = 1 if point.prompts else DECODE_STEPS - _ALONE_STEPS
        ends: list[float] = []
        ended = threading.Condition()

        def on_done(_: StepDone | StepFailed) -> None:
            with ended:
                ends.append(time.perf_counter())
                ended.notify()

        def wait_for(count: int) -> None:
            with ended:
                while len(ends) < count:
                    if not ended.wait(_LOOK_EVERY):
                        engine.check()

        for number in range(num_rounds * len(batches)):
            # Steps end in the order of their launch: this batch's last one is over when so many are.
            wait_for(number - len(batches) + 1)
            batch = batches[number % len(batches)]
            self._step_id += 1
            tables = batch.tables if number < len(batches) else ()
            engine.launch(RunStep(self._step_id, batch.chunks, tables), on_done, _layer_done)
        wait_for(num_rounds * len(batches))
        for batch in batches:
            self._close(batch)
        # From the end of the first step that met a full pipeline.
        return (ends[-1] - ends[self._num_stages - 1]) / (len(ends) - self._num_stages)

    def _open_batch(self, point: Point, blocks: Iterator[int]) -> _Batch:
        chunks, tables = [], []
        for cached in point.decodes:
            seq_id, table = self._open(cached, 1, cached + DECODE_STEPS, blocks, is_decode=True)
            chunks.append(Chunk(seq_id, 1, samples=True))
            tables.append(table)
        for num_tokens, cached in point.prompts:
            seq_id, table = self._open(cached, num_tokens, cached + num_tokens, blocks, is_decode=False)
            chunks.append(Chunk(seq_id, num_tokens, samples=True))
            tables.append(table)
        return _Batch(tuple(chunks), tuple(tables))

    def _open(
        self, cached: int, num_tokens: int, capacity: int, blocks: Iterator[int], *, is_decode: bool
    ) -> tuple[int, TableUpdate]:
        self._next_id += 1
        vocabulary = self._engine.description.vocab_size
        known = [self._random.randrange(vocabulary) for _ in range(cached + num_tokens)]
        prompt, output = (known[:-1], known[-1:]) if is_decode else (known, [])
        params = SamplingParams(max_tokens=DECODE_STEPS + 1, temperature=0.0, ignore_eos=True)
        request = Request(f"profile-{self._next_id}", "profile", tuple(prompt), params)
        self._engine.open(OpenSequence(self._next_id, request, (0,), tuple(output), cached))
        taken = tuple(next(blocks) for _ in range(-(-capacity // self._engine.layout.block_size)))
        return self._next_id, TableUpdate(self._next_id, 0, taken)

    def _close(self, batch: _Batch) -> None:
        for chunk in batch.chunks:
            self._engine.close(chunk.seq_id)

    def _step(self, chunks: tuple[Chunk, ...], tables: Sequence[TableUpdate]) -> float:
        self._step_id += 1
        step = RunStep(self._step_id, chunks, tuple(tables))
        start = time.perf_counter()
        self._engine.run(step, _layer_done)
        return time.perf_counter() - start


def _layer_done(layer: int) -> None:
    """Stands for the transport: a step that announces its layers runs them in groups."""
