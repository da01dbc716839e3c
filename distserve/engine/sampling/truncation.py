"""Where top_k, top_p and min_p cut a distribution off.

All three keep the most probable tokens, so together they are one threshold per row on the logits. Tokens that tie
with the last one kept are kept too: the result then does not depend on how a sort orders equals.
"""

import torch
from torch import Tensor

_NARROW = 256
"""Candidates sorted first: nearly every row's threshold lies among so few, and sorting a vocabulary is slow."""


def thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps.

    As in vLLM min_p applies first, then top_k, then top_p to what those left, renormalised.

    Args:
        logits: [S, V] float32, temperature applied.
        top_k: [S] int64, 0 is off.
        top_p: [S] float32 in (0, 1], 1 is off.
        min_p: [S] float32 in [0, 1], 0 is off.

    Returns:
        [S] float32; -inf keeps all.
    """
    vocab_size = logits.shape[-1]
    narrow = min(_NARROW, vocab_size)
    result, done = _thresholds(logits, top_k, top_p, min_p, narrow)
    if not bool(done.all()):
        rows = (~done).nonzero().squeeze(1)
        result[rows], _ = _thresholds(logits[rows], top_k[rows], top_p[rows], min_p[rows], vocab_size)
    return result


def _thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The rows' thresholds and which of them the ``width`` largest logits were enough to find."""
    best = logits.topk(width, dim=-1).values
    threshold = best[:, 0] + min_p.log()
    has_k = (top_k > 0) & (top_k < logits.shape[-1])
    kth = best.gather(1, (top_k.clamp(1, width) - 1).unsqueeze(1)).squeeze(1)
    threshold = torch.where(has_k, torch.maximum(threshold, kth), threshold)
    done = ~has_k | (top_k <= width)
    has_p = top_p < 1
    if bool(has_p.any()):
        kept = logits >= threshold.unsqueeze(1)
        total = torch.where(kept, (logits - best[:, :1]).exp(), 0.0).sum(-1, keepdim=True)
        mass = torch.where(best >= threshold.unsqueeze(1), (best - best[:, :1]).exp(), 0.0) / total
        before = mass.cumsum(-1) - mass
        # The most probable token stays whatever top_p is; the others while the mass before them is short of it.
        num_kept = (before < top_p.unsqueeze(1)).sum(-1).clamp(min=1)
        nucleus = best.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1)
        threshold = torch.where(has_p, torch.maximum(threshold, nucleus), threshold)
        done &= ~has_p | (num_kept < width) | (best[:, -1] < threshold)
    return threshold, done | (width == logits.shape[-1])
