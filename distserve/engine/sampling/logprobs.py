"""Log-probabilities as the API reports them: of the model's own distribution, before temperature and the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distserve.core.request import TokenLogprobs

_ROWS_AT_ONCE = 64
"""Bounds the float32 copy of the logits: a long prompt's would not fit."""


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability and rank of each row's token, and its ``num_top[s]`` best alternatives, best first.

    Args:
        logits: [S, V], raw.
        tokens: [S] int64.
        num_top: alternatives wanted, per row.
    """
    pieces = (slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(num_top), _ROWS_AT_ONCE))
    return [entry for rows in pieces for entry in _piece(logits[rows], tokens[rows], num_top[rows])]


def _piece(logits: Tensor, tokens: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    # As vLLM: the number of tokens at least as probable, so the best has rank 1.
    ranks = (logprobs >= chosen).sum(-1)
    best = logprobs.topk(min(max(num_top), logprobs.shape[-1]), dim=-1)
    tops = [
        tuple(zip(ids[:n], values[:n], strict=True))
        for ids, values, n in zip(best.indices.tolist(), best.values.tolist(), num_top, strict=True)
    ]
    return [TokenLogprobs(*entry) for entry in zip(chosen.squeeze(1).tolist(), ranks.tolist(), tops, strict=True)]
