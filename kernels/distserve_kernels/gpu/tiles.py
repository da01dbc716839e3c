"""Device code that several kernels share: finding a tile's segment, and the running softmax of attention.

Scores are kept in units of log2, since exp2 is what the hardware has: ``softmax(x) = exp2(x * LOG2E) / sum``.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_segment(starts_ptr, tile, num_segments, TILE: tl.constexpr):
    """The segment that owns ``tile``: the largest b with ``starts[b] // TILE + b <= tile``.

    Numbering tiles so wastes at most one per segment and needs no sum over the segments on the host: segment b's tiles
    begin at ``starts[b] // TILE + b``, and ``T // TILE + num_segments`` tiles are enough for all.
    """
    low = num_segments * 0
    high = num_segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TILE + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def tanh(x):
    """Exact to about 1e-7 absolute, and right at both ends: exp overflows to infinity, and 2 / infinity is 0."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def log2_scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [M, N] in log2 units of queries [M, D] and keys [N, D]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    return scores * LOG2E


@triton.jit
def fold(scores, v, best, total, acc, PRECISION: tl.constexpr):
    """One step of the running softmax (Milakov and Gimelshein, 2018): the state after keys with ``scores`` [M, N].

    ``best`` [M] is the largest score so far, ``total`` [M] and ``acc`` [M, D] the sums of weights and of weighted
    values relative to it. A row that has seen nothing yet stays at (-inf, 0, 0).
    """
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row without any visible key: subtracting -inf from -inf would be NaN.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_best, total, acc
