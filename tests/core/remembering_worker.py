"""A checking worker that also knows what every slot of KV memory holds, and so whether a sequence may read it."""

from collections.abc import Sequence
from typing import Any

from distserve.core.commands import CloseSequence, OpenSequence, RunStep
from distserve.core.events import StepDone
from distserve.core.latency import StepShape
from tests.core.checking_worker import CheckingWorker, TokenSource


class RememberingWorker(CheckingWorker):
    """Slots hold all tokens up to theirs, as a hash: what the KV of a token depends on."""

    def __init__(self, block_size: int, tokens: TokenSource) -> None:
        super().__init__(block_size, tokens)
        self._size = block_size
        self._memory: dict[tuple[int, int], int] = {}
        self._chains: dict[int, list[int]] = {}
        self._positions: dict[int, int] = {}

    def open(self, command: OpenSequence) -> None:
        super().open(command)
        chain: list[int] = []
        extend(chain, [*command.request.prompt_token_ids, *command.output_token_ids])
        self._chains[command.seq_id] = chain
        self._positions[command.seq_id] = command.num_computed_tokens

    def close(self, command: CloseSequence) -> None:
        super().close(command)
        del self._chains[command.seq_id], self._positions[command.seq_id]

    def run(self, step: RunStep) -> tuple[StepShape, StepDone]:
        for source, target in step.copies:
            for offset in range(self._size):
                if (source, offset) in self._memory:
                    self._memory[target, offset] = self._memory[source, offset]
        shape, done = super().run(step)
        # Within a step all is written before anything is read.
        for chunk in step.chunks:
            start = self._positions[chunk.seq_id]
            self._positions[chunk.seq_id] = start + chunk.num_tokens
            for position in range(start, start + chunk.num_tokens):
                self._memory[self._slot(chunk.seq_id, position)] = self._chains[chunk.seq_id][position]
        drawn = iter(done.tokens)
        for chunk in step.chunks:
            chain = self._chains[chunk.seq_id]
            for position in range(self._positions[chunk.seq_id]):
                held = self._memory.get(self._slot(chunk.seq_id, position))
                assert held == chain[position], "reads the KV of other tokens"
            if chunk.samples:
                tokens = [next(drawn) for _ in self._lines[chunk.seq_id].choices]
                extend(chain, tokens[:1])
        return shape, done

    def copy_from(self, source: "RememberingWorker", src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> None:
        """A pull: what the source's blocks hold now."""
        for src, dst in zip(src_blocks, dst_blocks, strict=True):
            for offset in range(self._size):
                self._memory[dst, offset] = source._memory.get((src, offset), 0)

    def _slot(self, seq_id: int, position: int) -> tuple[int, int]:
        return self._lines[seq_id].table[position // self._size], position % self._size


def extend(chain: list[int], tokens: Sequence[Any]) -> None:
    """Append each token's hash over itself and all before it."""
    for token in tokens:
        chain.append(hash((chain[-1] if chain else None, token)))
