"""What the engine remembers of a sequence between steps: its tokens, how many have KV, and its block table."""

import numpy as np
from numpy.typing import NDArray

from distserve.core.commands import OpenSequence, TableUpdate
from distserve.core.request import SamplingParams


class SequenceState:
    """One open sequence.

    ``tokens[:num_tokens]`` are its prompt and output, ``tokens[:num_computed]`` have KV in ``blocks``.
    """

    __slots__ = (
        "blocks",
        "choices",
        "num_computed",
        "num_prompt",
        "num_tokens",
        "prompt_logprobs_from",
        "sampling",
        "seq_id",
        "tokens",
    )

    def __init__(self, command: OpenSequence, block_size: int) -> None:
        request = command.request
        self.seq_id = command.seq_id
        self.sampling: SamplingParams = request.sampling
        self.choices = command.choices
        self.num_prompt = len(request.prompt_token_ids)
        self.num_tokens = self.num_prompt + len(command.output_token_ids)
        self.num_computed = command.num_computed_tokens
        # One more than the longest the sequence may become: a step launched ahead overruns by one.
        capacity = max(request.max_total_tokens, self.num_tokens) + 1
        self.tokens = np.empty(capacity, dtype=np.int64)
        self.tokens[: self.num_prompt] = request.prompt_token_ids
        self.tokens[self.num_prompt : self.num_tokens] = command.output_token_ids
        self.blocks = np.zeros(-(-capacity // block_size), dtype=np.int32)
        # Log-probabilities of the prompt ride on the first token, so a sequence with output has them behind it.
        wants = self.sampling.prompt_logprobs is not None and not command.output_token_ids
        self.prompt_logprobs_from = self.num_computed if wants else self.num_prompt

    def append(self, tokens: NDArray[np.int64]) -> None:
        """Add output tokens."""
        self.tokens[self.num_tokens : self.num_tokens + len(tokens)] = tokens
        self.num_tokens += len(tokens)

    def update_blocks(self, update: TableUpdate) -> None:
        """Enter blocks into the table, which grows if a scheduler gives more than the sequence can fill."""
        end = update.start + len(update.blocks)
        if end > len(self.blocks):
            self.blocks = np.concatenate((self.blocks, np.zeros(end - len(self.blocks), dtype=np.int32)))
        self.blocks[update.start : end] = update.blocks

    @property
    def prompt(self) -> NDArray[np.int64]:
        """The prompt's tokens."""
        return self.tokens[: self.num_prompt]

    @property
    def output(self) -> NDArray[np.int64]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt : self.num_tokens]
