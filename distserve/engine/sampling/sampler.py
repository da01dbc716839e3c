"""The draw of one token for each row of a batch.

Order, as vLLM's: raw log-probabilities are taken aside; end tokens are masked before min_tokens, logit_bias is added,
penalties follow; rows with temperature 0 then take the largest logit, the others are divided by their temperature,
truncated (min_p, top_k, top_p) and drawn (:mod:`distserve.engine.sampling.race`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distserve.core.events import NOT_FINITE
from distserve.core.request import SamplingParams, TokenLogprobs
from distserve.engine.sampling.logprobs import token_logprobs
from distserve.engine.sampling.penalties import Penalties, has_penalties
from distserve.engine.sampling.philox import keys
from distserve.engine.sampling.race import draw
from distserve.engine.sampling.truncation import thresholds

GREEDY_BELOW = 1e-5
"""vLLM's: temperatures below this are 0."""
_STEPS_AHEAD = 32
"""Steps whose random keys are computed at once."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One token to draw: token ``index`` of ``choice``, after ``prompt`` and ``output``."""

    params: SamplingParams
    choice: int
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]

    @property
    def index(self) -> int:
        """The output token's number, from 0."""
        return len(self.output)


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens [S] int64 (NOT_FINITE where the logits were not), and log-probabilities for the rows that want them."""

    tokens: Tensor
    logprobs: tuple[TokenLogprobs | None, ...] | None


class Sampler:
    """Draws for the same rows step after step: after :meth:`__call__` each row stands at its next token."""

    def __init__(self, rows: Sequence[SamplingRow], vocab_size: int) -> None:
        params = [row.params for row in rows]
        self._is_plain = all(is_plain_greedy(p) for p in params)
        self._wants_logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]
        self._num_top = [params[i].logprobs or 0 for i in self._wants_logprobs]
        self._penalties: Penalties | None = None
        if self._is_plain:
            return
        self._indices = np.array([row.index for row in rows], dtype=np.uint64)
        self._seeds = np.array([p.seed % 2**64 for p in params], dtype=np.uint64)
        self._choices = np.array([row.choice for row in rows], dtype=np.uint64)
        self._keys = np.empty((0, len(rows), 2), dtype=np.uint32)
        penalised = [i for i, p in enumerate(params) if has_penalties(p)]
        if penalised:
            prompts, outputs = [rows[i].prompt for i in penalised], [rows[i].output for i in penalised]
            self._penalties = Penalties(penalised, [params[i] for i in penalised], prompts, outputs, vocab_size)
        bias = [
            (i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias if 0 <= token < vocab_size
        ]
        self._bias_at = torch.tensor([entry[:2] for entry in bias]).view(-1, 2).T
        self._bias = torch.tensor([entry[2] for entry in bias], dtype=torch.float32)
        ends = [
            (i, token, p.min_tokens)
            for i, p in enumerate(params)
            if p.min_tokens > rows[i].index
            for token in p.end_token_ids
            if 0 <= token < vocab_size
        ]
        self._end_at = np.array([entry[:2] for entry in ends], dtype=np.int64).reshape(-1, 2)
        self._end_until = np.array([entry[2] for entry in ends], dtype=np.uint64)
        temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32)
        self._random = (temperatures >= GREEDY_BELOW).nonzero().squeeze(1)
        drawn = [params[i] for i in self._random.tolist()]
        self._temperatures = temperatures[self._random].unsqueeze(1)
        self._top_k = torch.tensor([p.top_k for p in drawn], dtype=torch.int64)
        self._top_p = torch.tensor([p.top_p for p in drawn], dtype=torch.float32)
        self._min_p = torch.tensor([p.min_p for p in drawn], dtype=torch.float32)
        self._truncates = any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in drawn)

    def __call__(self, logits: Tensor) -> Draw:
        """Draw a token from each row of logits [S, V], which are left as they are."""
        if self._is_plain:
            best, tokens = logits.max(dim=-1)
        else:
            best = logits.amax(-1)
        all_finite = math.isfinite(best.sum().item())
        finite = best.isfinite()
        if not self._is_plain:
            tokens = self._choose(logits if all_finite else torch.where(finite.unsqueeze(1), logits, 0.0))
        if not all_finite:
            tokens = torch.where(finite, tokens, NOT_FINITE)
        logprobs = self._logprobs(logits, tokens) if self._wants_logprobs else None
        if not self._is_plain:
            self._indices += np.uint64(1)
            self._keys = self._keys[1:]
            if self._penalties is not None:
                self._penalties.count(tokens)
        return Draw(tokens, logprobs)

    def _choose(self, logits: Tensor) -> Tensor:
        """The tokens [S] that the requests' parameters make of finite logits [S, V]."""
        processed = self._process(logits)
        if len(self._random) == len(processed):
            return self._draw(processed)
        tokens = processed.max(dim=-1).indices
        if len(self._random):
            tokens[self._random] = self._draw(processed[self._random])
        return tokens

    def _process(self, logits: Tensor) -> Tensor:
        """End tokens masked, biases added, penalties applied: [S, V] float32."""
        ends = self._end_at[self._indices[self._end_at[:, 0]] < self._end_until]
        if not len(ends) and not len(self._bias) and self._penalties is None:
            return logits.float()
        logits = logits.to(torch.float32, copy=True)
        if len(ends):
            rows, tokens = torch.from_numpy(ends).T
            logits[rows, tokens] = -torch.inf
        if len(self._bias):
            logits.index_put_(tuple(self._bias_at), self._bias, accumulate=True)
        if self._penalties is not None:
            self._penalties.apply(logits)
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens of the rows that have a temperature; logits are those rows'."""
        logits = logits / self._temperatures
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        if self._truncates:
            threshold = thresholds(logits, self._top_k, self._top_p, self._min_p)
            weights *= (logits >= threshold.unsqueeze(1)).float()
        if len(self._keys) == 0:
            steps = np.arange(_STEPS_AHEAD, dtype=np.uint64)[:, None]
            self._keys = keys(self._seeds, self._choices, self._indices + steps)
        return draw(weights, self._keys[0][self._random.numpy()])

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> tuple[TokenLogprobs | None, ...]:
        rows = torch.tensor(self._wants_logprobs)
        entries = token_logprobs(logits[rows], tokens[rows].clamp(min=0), self._num_top)
        result: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, entry in zip(self._wants_logprobs, entries, strict=True):
            result[row] = entry
        return tuple(result)


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the token is simply the one with the largest logit."""
    return (
        params.temperature < GREEDY_BELOW
        and not params.logit_bias
        and params.min_tokens == 0
        and not has_penalties(params)
    )
