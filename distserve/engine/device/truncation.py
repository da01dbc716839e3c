"""Where top_k, top_p and min_p cut a distribution off, by sorting: no step of it needs the host.

The same thresholds as :func:`distserve.engine.sampling.truncation.thresholds`, which avoids the sort a CPU is slow at.
"""

import torch
from torch import Tensor


def sorted_thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps; tokens that tie with it are kept too.

    min_p applies first, then top_k, then top_p to what those left, renormalised.

    Args:
        logits: [S, V] float32, temperature applied; the largest of each row is finite.
        top_k: [S] int64, 0 is off.
        top_p: [S] float32 in (0, 1], 1 is off.
        min_p: [S] float32 in [0, 1], 0 is off.

    Returns:
        [S] float32.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    best = ordered[:, :1]
    vocab_size = logits.shape[1]
    num_kept = top_k.masked_fill(top_k == 0, vocab_size).clamp(max=vocab_size)
    at_least = torch.maximum(best.squeeze(1) + min_p.log(), _at(ordered, num_kept))
    left = ordered >= at_least.unsqueeze(1)
    weights = (ordered - best).exp() * left
    passed = weights.cumsum(-1) - weights
    limit = (top_p * weights.sum(-1)).unsqueeze(1)
    border = _at(ordered, ((passed < limit) & left).sum(-1).clamp(min=1))
    return torch.where(top_p < 1, torch.maximum(at_least, border), at_least)


def _at(ordered: Tensor, numbers: Tensor) -> Tensor:
    """The ``numbers[s]``-th entry of each row, counted from 1."""
    return ordered.gather(1, (numbers - 1).unsqueeze(1)).squeeze(1)
