"""What the host knows of a sequence whose tokens are drawn on a device: how many there are, not which.

Of its tokens only those it was opened with are known here; the newest drawn one is in the runner's ``last tokens`` on
the device, at the sequence's ``slot``, and an older one is never an input again.
"""

import numpy as np
from numpy.typing import NDArray

from distserve.core.commands import OpenSequence, TableUpdate
from distserve.core.request import SamplingParams
from distserve.engine.device.penalties import PenaltyRow


class DeviceSequence:
    """One open sequence.

    ``num_computed`` tokens have KV in ``blocks`` once the steps launched are done, ``num_output`` are drawn then.
    """

    __slots__ = (
        "blocks",
        "choices",
        "known",
        "num_blocks",
        "num_computed",
        "num_output",
        "num_prompt",
        "penalties",
        "prompt_logprobs_from",
        "sampling",
        "seq_id",
        "slot",
    )

    def __init__(self, command: OpenSequence, slot: int) -> None:
        request = command.request
        self.seq_id = command.seq_id
        self.slot = slot
        self.sampling: SamplingParams = request.sampling
        self.choices = command.choices
        self.num_prompt = len(request.prompt_token_ids)
        self.num_output = len(command.output_token_ids)
        self.num_computed = command.num_computed_tokens
        self.known = np.empty(self.num_prompt + self.num_output, dtype=np.int64)
        self.known[: self.num_prompt] = request.prompt_token_ids
        self.known[self.num_prompt :] = command.output_token_ids
        self.blocks = np.zeros(16, dtype=np.int32)
        self.num_blocks = 0
        self.penalties: PenaltyRow | None = None
        """What penalties depend on, on the device, from the first draw on."""
        # Log-probabilities of the prompt ride on the first token, so a sequence with output has them behind it.
        wants = self.sampling.prompt_logprobs is not None and not command.output_token_ids
        self.prompt_logprobs_from = self.num_computed if wants else self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens that are known, drawn or being drawn."""
        return self.num_prompt + self.num_output

    @property
    def prompt(self) -> NDArray[np.int64]:
        """The prompt's tokens."""
        return self.known[: self.num_prompt]

    def update_blocks(self, update: TableUpdate) -> None:
        """Enter blocks into the table."""
        end = update.start + len(update.blocks)
        if end > len(self.blocks):
            self.blocks = np.concatenate((self.blocks, np.zeros(max(end, len(self.blocks)), dtype=np.int32)))
        self.blocks[update.start : end] = update.blocks
        self.num_blocks = max(self.num_blocks, end)
