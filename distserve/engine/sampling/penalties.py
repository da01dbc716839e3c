"""Repetition, presence and frequency penalties, on the rows that want any.

Repetition (Keskar et al., 2019, "CTRL") counts tokens of prompt and output; presence and frequency (OpenAI) count
output only. Counts are kept from step to step.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distserve.core.request import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether any of the three is on."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class Penalties:
    """Penalties of some rows of a batch, with the token counts they depend on."""

    def __init__(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        prompts: Sequence[NDArray[np.int64]],
        outputs: Sequence[NDArray[np.int64]],
        vocab_size: int,
    ) -> None:
        """``rows`` are the batch rows that want penalties; the other sequences are aligned with them."""
        self.rows = torch.tensor(rows)
        self.repetition = torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32).unsqueeze(1)
        self.presence = torch.tensor([p.presence_penalty for p in params], dtype=torch.float32).unsqueeze(1)
        self.frequency = torch.tensor([p.frequency_penalty for p in params], dtype=torch.float32).unsqueeze(1)
        self.in_prompt = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
        self.counts = torch.zeros(len(rows), vocab_size)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            self.in_prompt[i, torch.from_numpy(prompt)] = True
            self.counts[i] = torch.from_numpy(np.bincount(output, minlength=vocab_size)).float()

    def apply(self, logits: Tensor) -> None:
        """Change the rows of logits [S, V] float32 in place."""
        penalised = logits[self.rows]
        in_output = self.counts > 0
        repeated = torch.where(penalised > 0, penalised / self.repetition, penalised * self.repetition)
        penalised = torch.where(in_output | self.in_prompt, repeated, penalised)
        penalised -= self.frequency * self.counts
        penalised -= self.presence * in_output
        logits[self.rows] = penalised

    def count(self, tokens: Tensor) -> None:
        """Count the tokens [S] just drawn for the batch as output."""
        self.counts[torch.arange(len(self.rows)), tokens[self.rows]] += 1
