"""The draw of one token for each row of a batch, on the device and without ever waiting for it.

The order of operations, and the random numbers, are those of :mod:`distserve.engine.sampling.sampler`, so that in
float32 the same logits give the same tokens on every device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distserve.core.events import NOT_FINITE
from distserve.core.request import SamplingParams
from distserve.engine.device.backend import Array
from distserve.engine.device.penalties import DevicePenalties, PenaltyRow
from distserve.engine.device.truncation import sorted_thresholds
from distserve.engine.sampling.logprobs import Scores, score
from distserve.engine.sampling.sampler import GREEDY_BELOW, is_plain_greedy
from distserve_kernels import philox_keys, race_draw


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One token to draw: token ``index`` of ``choice``; ``penalties`` if ``params`` want any."""

    params: SamplingParams
    choice: int
    index: int
    penalties: PenaltyRow | None


@dataclass(frozen=True, slots=True)
class DeviceDraw:
    """Tokens [S] int64 (NOT_FINITE where the logits were not), and scores of the rows that want log-probabilities."""

    tokens: Tensor
    scores: Scores | None


class DeviceSampler:
    """Draws for the same rows step after step: after :meth:`__call__` each row stands at its next token.

    ``scored_rows`` are those that want log-probabilities, ``num_top[i]`` the alternatives that the i-th of them wants.
    """

    def __init__(self, rows: Sequence[DeviceRow], vocab_size: int, upload: Callable[[Array], Tensor]) -> None:
        params = [row.params for row in rows]
        self._upload = upload
        self.scored_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.num_top = [params[i].logprobs or 0 for i in self.scored_rows]
        self._scored = self._ints(self.scored_rows) if self.scored_rows else None
        self._is_plain = all(is_plain_greedy(p) for p in params)
        if self._is_plain:
            return
        self._indices = self._ints([row.index for row in rows])
        penalised = [i for i, row in enumerate(rows) if row.penalties is not None]
        states = [row.penalties for row in rows if row.penalties is not None]
        self._penalties = (
            DevicePenalties(penalised, [params[i] for i in penalised], states, upload) if penalised else None
        )
        bias = [
            (i * vocab_size + token, value)
            for i, p in enumerate(params)
            for token, value in p.logit_bias
            if 0 <= token < vocab_size
        ]
        self._bias_at = self._ints([at for at, _ in bias]) if bias else None
        self._bias = self._floats([value for _, value in bias])
        ends = [
            (i, i * vocab_size + token, p.min_tokens)
            for i, p in enumerate(params)
            if p.min_tokens > rows[i].index
            for token in p.end_token_ids
            if 0 <= token < vocab_size
        ]
        self._ends = self._ints(ends).T.contiguous() if ends else None
        self._set_random([i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW], params, rows)

    def _set_random(
        self, random_rows: Sequence[int], params: Sequence[SamplingParams], rows: Sequence[DeviceRow]
    ) -> None:
        """Upload what the rows with a temperature are drawn with."""
        self._num_rows = len(rows)
        self._num_random = len(random_rows)
        self._random = self._ints(random_rows)
        drawn = [params[i] for i in random_rows]
        self._temperatures = self._floats([p.temperature for p in drawn]).unsqueeze(1)
        self._seeds = self._upload(np.array([p.seed % 2**64 for p in drawn], dtype=np.uint64).view(np.int64))
        self._choices = self._ints([rows[i].choice for i in random_rows])
        cut = [i for i, p in enumerate(drawn) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
        self._cut = self._ints(cut) if cut else None
        self._top_k = self._ints([drawn[i].top_k for i in cut])
        self._top_p = self._floats([drawn[i].top_p for i in cut])
        self._min_p = self._floats([drawn[i].min_p for i in cut])

    def __call__(self, logits: Tensor) -> DeviceDraw:
        """Draw a token from each row of logits [S, V], which are left as they are."""
        best, tokens = logits.max(dim=-1)
        finite = best.isfinite()
        if not self._is_plain:
            tokens = self._choose(logits.float().masked_fill(~finite.unsqueeze(1), 0.0))
            self._indices += 1
        if not self._is_plain and self._penalties is not None:
            self._penalties.count(tokens)
        scores = None
        if self._scored is not None:
            # The rows' own tokens where they were drawn: a row that is not finite fails, whatever its scores.
            chosen = tokens.index_select(0, self._scored)
            scores = score(logits.index_select(0, self._scored), chosen, max(self.num_top))
        return DeviceDraw(tokens.masked_fill(~finite, NOT_FINITE), scores)

    def _choose(self, logits: Tensor) -> Tensor:
        """The tokens [S] that the requests' parameters make of finite logits [S, V] float32, which may be changed."""
        flat = logits.view(-1)
        if self._ends is not None:
            rows, at, until = self._ends
            is_early = self._indices.index_select(0, rows) < until
            flat.scatter_add_(0, at, torch.zeros_like(at, dtype=torch.float32).masked_fill(is_early, -torch.inf))
        if self._bias_at is not None:
            flat.scatter_add_(0, self._bias_at, self._bias)
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self._num_random == self._num_rows:
            return self._draw(logits)
        tokens = logits.argmax(dim=-1)
        if self._num_random > 0:
            tokens.index_copy_(0, self._random, self._draw(logits.index_select(0, self._random)))
        return tokens

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens of the rows that have a temperature; logits are those rows'."""
        logits = logits / self._temperatures
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        if self._cut is not None:
            cut = logits.index_select(0, self._cut)
            border = sorted_thresholds(cut, self._top_k, self._top_p, self._min_p)
            kept = weights.index_select(0, self._cut) * (cut >= border.unsqueeze(1))
            weights.index_copy_(0, self._cut, kept)
        indices = self._indices.index_select(0, self._random)
        return race_draw(weights, philox_keys(self._seeds, self._choices, indices))

    def _ints(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return self._upload(np.array(values, dtype=np.int64))

    def _floats(self, values: Sequence[float]) -> Tensor:
        return self._upload(np.array(values, dtype=np.float32))
