"""Repetition, presence and frequency penalties on the device; see :mod:`distserve.engine.sampling.penalties`.

Which tokens a sequence has is kept on the device from its first draw on, since the host may not know the newest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distserve.core.request import SamplingParams
from distserve.engine.device.backend import Array


@dataclass(slots=True)
class PenaltyRow:
    """A sequence's tokens: ``in_prompt`` [V] bool, ``counts`` [V] float32 of the output."""

    in_prompt: Tensor
    counts: Tensor


def make_row(
    prompt: NDArray[np.int64], output: NDArray[np.int64], vocab_size: int, upload: Callable[[Array], Tensor]
) -> PenaltyRow:
    """The row of a sequence all of whose tokens the host knows."""
    prompt_ids, output_ids = upload(prompt), upload(output)
    in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=prompt_ids.device)
    in_prompt.index_fill_(0, prompt_ids, value=True)
    counts = torch.zeros(vocab_size, device=prompt_ids.device)
    counts.scatter_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.float32))
    return PenaltyRow(in_prompt, counts)


class DevicePenalties:
    """Penalties of some rows of a batch. ``states[i]`` moves along: it is up to date after each :meth:`count`."""

    def __init__(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        states: Sequence[PenaltyRow],
        upload: Callable[[Array], Tensor],
    ) -> None:
        """``rows`` are the batch rows that want penalties; the other sequences are aligned with them."""
        self._rows = upload(np.array(rows, dtype=np.int64))
        factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        uploaded = upload(np.array(factors, dtype=np.float32).T.copy()).unsqueeze(-1)
        self._repetition, self._presence, self._frequency = uploaded
        self._in_prompt = torch.stack([state.in_prompt for state in states])
        self._counts = torch.stack([state.counts for state in states])
        for state, in_prompt, counts in zip(states, self._in_prompt, self._counts, strict=True):
            state.in_prompt, state.counts = in_prompt, counts

    def apply(self, logits: Tensor) -> None:
        """Change the rows of logits [S, V] float32 in place."""
        penalised = logits.index_select(0, self._rows)
        in_output = self._counts > 0
        repeated = torch.where(penalised > 0, penalised / self._repetition, penalised * self._repetition)
        penalised = torch.where(in_output | self._in_prompt, repeated, penalised)
        penalised -= self._frequency * self._counts
        penalised -= self._presence * in_output
        logits.index_copy_(0, self._rows, penalised)

    def count(self, tokens: Tensor) -> None:
        """Count the tokens [S] just drawn for the batch, none negative, as output."""
        drawn = tokens.index_select(0, self._rows).unsqueeze(1)
        self._counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))
