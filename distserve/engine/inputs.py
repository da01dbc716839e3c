"""What a model's forward pass needs to know of a step's batch."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The T new tokens of B sequences, flattened, each sequence's together and in order."""

    tokens: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64"""
    logits_rows: Tensor
    """[R] int64: indices of the tokens after which logits are wanted, in the order of the logits"""
    slots: Tensor
    """[T] int64: where a token's KV goes, ``block * P + offset``"""
    block_tables: Tensor
    """[B, max blocks] int32"""
    query_starts: Tensor
    """[B + 1] int32: sequence b owns tokens ``query_starts[b]:query_starts[b + 1]``"""
    context_lens: Tensor
    """[B] int32: tokens of each sequence, this step's included"""

    def to(self, device: torch.device) -> "StepInputs":
        """The same inputs on ``device``; these themselves where they are there already."""
        if self.tokens.device.type == device.type:
            return self
        return StepInputs(*(getattr(self, field.name).to(device) for field in fields(self)))
