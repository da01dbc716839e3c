"""Log-probabilities as the API reports them: of the model's own distribution, before temperature and the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.core.request import TokenLogprobs

ROWS_AT_ONCE = 64
"""Bounds the float32 copy of the logits: a long prompt's would not fit."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What log-probabilities are reported from, where the logits are.

    ``chosen`` [S] float32 and ``ranks`` [S] int64 of each row's token, ``ids`` and ``values`` [S, k] of the best.
    """

    chosen: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields in order."""
        return self.chosen, self.ranks, self.ids, self.values


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability and rank of each row's token, and its ``num_top[s]`` best alternatives, best first.

    Args:
        logits: [S, V], raw.
        tokens: [S] int64.
        num_top: alternatives wanted, per row.
    """
    pieces = (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(num_top), ROWS_AT_ONCE))
    return [
        entry
        for rows in pieces
        for entry in entries(score(logits[rows], tokens[rows], max(num_top[rows])), num_top[rows])
    ]


def score(logits: Tensor, tokens: Tensor, num_top: int) -> Scores:
    """Score each row's token and its ``num_top`` best alternatives: logits [S, V], tokens [S] int64."""
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    # As vLLM: the number of tokens at least as probable, so the best has rank 1.
    ranks = (logprobs >= chosen).sum(-1)
    best = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return Scores(chosen.squeeze(1), ranks, best.indices, best.values)


def entries(scores: Scores, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's entry, with ``num_top[s]`` alternatives, of scores that are on the CPU."""
    tops = [
        tuple(zip(ids[:n], values[:n], strict=True))
        for ids, values, n in zip(scores.ids.tolist(), scores.values.tolist(), num_top, strict=True)
    ]
    return [TokenLogprobs(*entry) for entry in zip(scores.chosen.tolist(), scores.ranks.tolist(), tops, strict=True)]
