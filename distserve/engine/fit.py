"""Fits the step-time formulas of :mod:`distserve.core.profile` to measured steps.

Decode batches are tabulated as they were measured. Steps with prompts are fitted by relative least squares with no
negative coefficient (Lawson and Hanson's NNLS): one more prompt never makes a step shorter, whatever the noise of a
point. The table's values are coefficients too, of hat functions, so that a point between two knots bears on both.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import Measurement, StepFit, Surface, Table, own_pairs

Floats = NDArray[np.float64]


def fit_steps(measurements: Sequence[Measurement]) -> StepFit:
    """The fit over ``measurements``, which hold decode batches, prompts alone, and prompts beside decoding sequences.

    Raises ConfigError if there is no decode batch or no prompt among them.
    """
    decodes = [m for m in measurements if m.shape.num_prefill_tokens == 0]
    prefills = [m for m in measurements if m.shape.num_prefill_tokens > 0]
    if not decodes or not prefills:
        raise ConfigError("a profile needs decode steps and prefill steps: the KV memory held no point of the grid")
    alone = {m.shape.num_prefill_tokens for m in prefills if m.shape.num_decodes == 0}
    shapes = [m.shape for m in prefills]
    prefill, coefficients = _solve(
        sorted(alone),
        [shape.num_prefill_tokens + shape.num_decodes for shape in shapes],
        [_features(shape) for shape in shapes],
        [m.median for m in prefills],
    )
    return StepFit(_surface(decodes), prefill, *coefficients)


def _features(shape: StepShape) -> list[int]:
    """What a step with prompts is made of, in the order of StepFit's coefficients."""
    num_cached = max(0, shape.prefill_pairs - own_pairs(shape.num_prefill_tokens))
    return [
        shape.prefill_pairs - num_cached,
        num_cached,
        shape.num_prefills - 1,
        shape.num_decodes,
        shape.decode_context,
    ]


def _surface(decodes: Sequence[Measurement]) -> Surface:
    """What was measured, as it is; where KV memory held no batch of that size and context, the row's trend goes on."""
    rows: dict[int, dict[int, float]] = {}
    for m in decodes:
        rows.setdefault(m.shape.num_decodes, {})[round(m.shape.decode_context / m.shape.num_decodes)] = m.median
    contexts = tuple(sorted({context for row in rows.values() for context in row}))
    batches = tuple(sorted(rows))
    tables = [Table(tuple(sorted(rows[b])), tuple(rows[b][c] for c in sorted(rows[b]))) for b in batches]
    return Surface(batches, contexts, tuple(tuple(table(c) for c in contexts) for table in tables))


def _solve(
    knots: Sequence[int], counts: Sequence[int], features: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[Table, list[float]]:
    """A table over ``counts`` and a coefficient for each feature, such that together they come nearest ``seconds``."""
    times = np.asarray(seconds)
    extra = np.asarray(features, dtype=float)
    hats = _hats(np.asarray(knots, dtype=float), np.asarray(counts, dtype=float))
    system = np.hstack([hats, extra]) / times[:, None]
    # Columns of like size: pairs are counted in tens of thousands.
    scale = np.maximum(np.abs(system).max(axis=0), 1e-300)
    solution, _ = nnls(system / scale, np.ones(len(times)))
    coefficients = solution / scale
    values = coefficients[: len(knots)]
    return Table(tuple(knots), tuple(values.tolist())), coefficients[len(knots) :].tolist()


def _hats(knots: Floats, counts: Floats) -> Floats:
    """Hat functions of ``knots`` at ``counts``, [points, knots]; a count beyond the last knot extrapolates."""
    result = np.zeros((len(counts), len(knots)))
    if len(knots) == 1:
        result[:] = 1.0
        return result
    piece = np.clip(np.searchsorted(knots, counts, side="right") - 1, 0, len(knots) - 2)
    share = (counts - knots[piece]) / (knots[piece + 1] - knots[piece])
    rows = np.arange(len(counts))
    result[rows, piece] = 1 - share
    result[rows, piece + 1] = share
    return result
