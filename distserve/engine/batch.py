"""A step's batch: model inputs made from chunks of open sequences, and carried over to the next step where possible.

A decode batch that stays the same (one sampled token for each sequence, the same sequences in the same order) is
moved on by a few vector operations; its sequences' own state is brought up to date only when the batch changes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from distserve.core.commands import Chunk, TableUpdate
from distserve.engine.inputs import StepInputs
from distserve.engine.sampling import Sampler, SamplingRow
from distserve.engine.sequences import SequenceState


class Batch:
    """The sequences of a step with everything the model and the sampler need for them."""

    def __init__(
        self,
        chunks: tuple[Chunk, ...],
        sequences: Sequence[SequenceState],
        block_size: int,
        vocab_size: int,
    ) -> None:
        """``sequences[b]`` is the one that ``chunks[b]`` names."""
        self.chunks = chunks
        self.sequences = sequences
        self.block_size = block_size
        lengths = np.array([chunk.num_tokens for chunk in chunks])
        starts = np.array([sequence.num_computed for sequence in sequences])
        ends = starts + lengths
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        self._rows_of = {sequence.seq_id: row for row, sequence in enumerate(sequences)}
        self._tables = np.zeros((len(sequences), max(len(sequence.blocks) for sequence in sequences)), dtype=np.int32)
        for table, sequence in zip(self._tables, sequences, strict=True):
            table[: len(sequence.blocks)] = sequence.blocks
        self._tokens = np.concatenate([s.tokens[a:b] for s, a, b in zip(sequences, starts, ends, strict=True)])
        self._positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
        self._context_lens = ends.astype(np.int32)
        self._token_rows = np.repeat(np.arange(len(chunks)), lengths)
        sampling = [b for b, chunk in enumerate(chunks) if chunk.samples]
        assert all(ends[b] == sequences[b].num_tokens for b in sampling)
        self.prompt_rows, wanted = self._prompt_logprob_rows(starts, ends, offsets)
        logits_rows = np.concatenate([*wanted, offsets[1:][sampling] - 1])
        self._is_decode = len(sampling) == len(chunks) == offsets[-1] and all(len(s.choices) == 1 for s in sequences)
        self._drawn: list[NDArray[np.int64]] = []
        self.sampled = [sequences[b] for b in sampling]
        # Row of the sampled logits that each draw takes: a sequence with several choices draws several times.
        self.draw_rows = torch.from_numpy(np.repeat(np.arange(len(sampling)), [len(s.choices) for s in self.sampled]))
        self.sampler = Sampler(
            [
                SamplingRow(sequence.sampling, choice, sequence.prompt, sequence.output)
                for sequence in self.sampled
                for choice in sequence.choices
            ],
            vocab_size,
        )
        self._slots = np.empty(offsets[-1], dtype=np.int64)
        self._fill_slots()
        # The tensors share the arrays' memory: moving the arrays on moves the inputs on.
        self.inputs = StepInputs(
            tokens=torch.from_numpy(self._tokens),
            positions=torch.from_numpy(self._positions),
            logits_rows=torch.from_numpy(logits_rows),
            slots=torch.from_numpy(self._slots),
            block_tables=torch.from_numpy(self._tables),
            query_starts=torch.from_numpy(offsets.astype(np.int32)),
            context_lens=torch.from_numpy(self._context_lens),
        )

    def _prompt_logprob_rows(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> tuple[list[tuple[SequenceState, int, int]], list[NDArray[np.int64]]]:
        """Which logits prompt log-probabilities come from.

        Returns (sequence, first, last): its prompt tokens ``[first, last)`` are to be scored; and for each of those
        the token rows, which are the rows of the tokens before them.
        """
        spans, rows = [], []
        for b, sequence in enumerate(self.sequences):
            first = max(sequence.prompt_logprobs_from, int(starts[b])) + 1
            last = min(int(ends[b]) + 1, sequence.num_prompt)
            if first < last:
                spans.append((sequence, first, last))
                rows.append(np.arange(first, last) - 1 - starts[b] + offsets[b])
        return spans, rows

    def _fill_slots(self) -> None:
        blocks = self._tables[self._token_rows, self._positions // self.block_size]
        self._slots[:] = blocks.astype(np.int64) * self.block_size + self._positions % self.block_size

    def can_repeat(self, chunks: tuple[Chunk, ...]) -> bool:
        """Whether a step over ``chunks`` is the same decode batch, one token further."""
        return self._is_decode and (chunks is self.chunks or chunks == self.chunks)

    def advance(self, updates: Sequence[TableUpdate]) -> None:
        """Move a decode batch on to the tokens it drew last, with the table updates of the new step."""
        for update in updates:
            row = self._rows_of.get(update.seq_id)
            if row is not None:
                self._update_table(row, update)
        self._tokens[:] = self._drawn[-1]
        self._positions += 1
        self._context_lens += 1
        self._fill_slots()

    def _update_table(self, row: int, update: TableUpdate) -> None:
        end = update.start + len(update.blocks)
        missing = end - self._tables.shape[1]
        if missing > 0:
            self._tables = np.pad(self._tables, ((0, 0), (0, missing)))
            self.inputs = replace(self.inputs, block_tables=torch.from_numpy(self._tables))
        self._tables[row, update.start : end] = update.blocks

    def record(self, tokens: NDArray[np.int64]) -> None:
        """Note the tokens drawn, one for each row of ``draw_rows``.

        Where there is none, 0 stands for it: a step launched ahead may still run the sequence that is to be failed.
        """
        tokens = np.maximum(tokens, 0)
        if self._is_decode:
            self._drawn.append(tokens)
            return
        for chunk, sequence in zip(self.chunks, self.sequences, strict=True):
            sequence.num_computed += chunk.num_tokens
        start = 0
        for sequence in self.sampled:
            count = len(sequence.choices)
            # A sequence that is sampled several times ends there: none of the tokens is its next.
            if count == 1:
                sequence.append(tokens[start : start + 1])
            start += count

    def commit(self) -> None:
        """Bring the sequences of a decode batch up to date with the steps it has made."""
        if not self._drawn:
            return
        drawn = np.stack(self._drawn, axis=1)
        for sequence, tokens in zip(self.sequences, drawn, strict=True):
            sequence.append(tokens)
            sequence.num_computed += len(tokens)
        self._drawn.clear()
