"""The engine's own prefill and decode steps over a grid of shapes, on this machine, alone: which, and their medians.

Measures and nothing else: what follows from the times is :mod:`distserve.core.profile`'s business, how one is taken
:mod:`distserve.engine.stepper`'s.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from distserve.core.latency import StepShape
from distserve.core.profile import Measurement
from distserve.engine.group.driver import RankGroup
from distserve.engine.stepper import DECODE_STEPS, Point, Stepper, Times
from distserve.engine.worker import Worker


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
        c for c in ((64, 512) if quick else (32, 128, 256, 512, 1024, 2048)) if c + DECODE_STEPS <= max_model_len
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


def measure(
    engine: Worker | RankGroup, grid: Grid, *, num_rounds: int, on_progress: Callable[[int, int], None]
) -> list[Measurement]:
    """Visit every point of ``grid`` ``num_rounds`` times, in a new order each time, after a round that does not count.

    Points whose sequences do not fit ``engine``'s KV memory are left out. ``on_progress(visits made, visits in all)``.
    """
    stepper = Stepper(engine)
    ordered = [point for point in dict.fromkeys(_points(grid)) if stepper.has_room(point)]
    times = {point: Times() for point in ordered}
    points = list(ordered)
    order = random.Random(0)
    total = len(points) * (num_rounds + 1)
    done = 0
    for round_number in range(num_rounds + 1):
        order.shuffle(points)
        for point in points:
            stepper.visit(point, times[point] if round_number > 0 else Times())
            done += 1
            on_progress(done, total)
    return [_summary(point, times[point]) for point in ordered]


def _points(grid: Grid) -> Iterator[Point]:
    for batch, cached in grid.decode:
        yield Point((cached,) * batch, ())
    for count, num_tokens, cached in grid.prefill:
        yield Point((), ((num_tokens, cached),) * count)
    for batch, context, num_tokens, cached in grid.mixed:
        yield Point((context,) * batch, ((num_tokens, cached),))


def _summary(point: Point, times: Times) -> Measurement:
    shape = point.first_shape
    alone, change = times.first, 0.0
    if times.later:
        alone, change = times.later, median(times.first) - median(times.later)
        # The middle of the visits' later steps stands for all of them: the context grows by a token a step.
        grown = len(point.decodes) * DECODE_STEPS // 2
        shape = StepShape(num_decodes=shape.num_decodes, decode_context=shape.decode_context + grown)
    if not times.apart:
        return Measurement(shape, median(alone), min(alone), len(alone), change)
    return Measurement(shape, median(times.apart), min(times.apart), len(times.apart), change, median(alone))
