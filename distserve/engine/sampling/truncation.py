"""Where top_k, top_p and min_p cut a distribution off.

All three keep the most probable tokens, so together they are one threshold per row on the logits. Tokens that tie
with the last one kept are kept too: the result then does not depend on how a sort orders equals.

Sorting a vocabulary for every row would take longer than the model. A histogram over the logits finds the narrow
range that the border lies in, and only that range is sorted: the result is exact.
"""

import torch
from torch import Tensor

_NUM_BINS = 1024
_FARTHEST = 60.0
"""Logits farther than this below the best share the last bin: their weights are below float32's resolution."""


def thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps.

    As in vLLM min_p applies first, then top_k, then top_p to what those left, renormalised.

    Args:
        logits: [S, V] float32, temperature applied; the largest of each row is finite.
        top_k: [S] int64, 0 is off.
        top_p: [S] float32 in (0, 1], 1 is off.
        min_p: [S] float32 in [0, 1], 0 is off.

    Returns:
        [S] float32; -inf keeps all.
    """
    best = logits.amax(-1)
    result = best + min_p.log()
    limited = (top_k > 0) & (top_k < logits.shape[-1])
    if bool(limited.any()):
        rows = limited.nonzero().squeeze(1)
        borders = _borders(logits[rows], None, top_k[rows].float())
        result[rows] = torch.maximum(result[rows], borders)
    limited = top_p < 1
    if bool(limited.any()):
        rows = limited.nonzero().squeeze(1)
        chosen, so_far = logits[rows], result[rows]
        weights = (chosen - best[rows].unsqueeze(1)).exp_()
        weights *= (chosen >= so_far.unsqueeze(1)).float()
        borders = _borders(chosen, weights, top_p[rows] * weights.sum(-1))
        result[rows] = torch.maximum(so_far, borders)
    return result


def _borders(logits: Tensor, weights: Tensor | None, limits: Tensor) -> Tensor:
    """Going down from the largest logit, the last one before which less than the limit's weight was passed.

    ``weights`` [S, V] are those of the logits [S, V], None for one each; ``limits`` is [S]. Returns [S].
    """
    distances = (logits.amax(-1, keepdim=True) - logits).clamp_(max=_FARTHEST)
    # Bins follow each row's own spread, twice the mean distance, so that few logits share the border's.
    scales = _NUM_BINS / (2 * distances.mean(-1, keepdim=True) + 1e-6)
    bins = (distances * scales).clamp_(max=_NUM_BINS - 1).long()
    masses = torch.zeros(len(logits), _NUM_BINS)
    masses.scatter_add_(1, bins, torch.ones(()).expand_as(logits) if weights is None else weights)
    before = masses.cumsum(-1) - masses
    # Bins without weight after the border's have as much before them as the limit, or come to nothing.
    border = ((before < limits.unsqueeze(1)) & (masses > 0)).long().cumsum(-1).argmax(-1, keepdim=True)
    inside = bins == border
    widest = int(inside.sum(-1).max())
    best = torch.where(inside, logits, -torch.inf).topk(widest, dim=-1)
    passed = torch.ones_like(best.values) if weights is None else weights.gather(1, best.indices)
    passed = passed.cumsum(-1) - passed + before.gather(1, border)
    inside_sorted = best.values > -torch.inf
    num_kept = ((passed < limits.unsqueeze(1)) & inside_sorted).sum(-1, keepdim=True).clamp_(min=1)
    return best.values.gather(1, num_kept - 1).squeeze(1)
