"""A step's batch as the host lays it out: positions, slots and tables; tokens only as far as the host knows them.

A decode batch that stays the same is moved on by :meth:`DeviceBatch.advance`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distserve.core.commands import Chunk, TableUpdate
from distserve.engine.device.backend import Array
from distserve.engine.device.sampler import DeviceRow, DeviceSampler
from distserve.engine.device.sequences import DeviceSequence
from distserve.engine.inputs import StepInputs

UNKNOWN = -1
"""Stands for a token that only the device knows."""

_UNKNOWN_TOKEN = np.array([UNKNOWN])

Ints = NDArray[np.int64]


class DeviceBatch:
    """The sequences of a step, as they are before it.

    ``is_decode``: one token of each is computed and one is drawn, so the batch may be repeated and captured.
    ``prompt_rows`` are (sequence, first, last): its prompt tokens ``[first, last)`` are scored from this step's logits,
    which come before those that tokens are drawn from; ``draw_rows`` say which of the latter each draw takes, where
    they are not simply in order, and ``draw_slots`` [S], on the device, where its token goes.
    """

    def __init__(
        self, chunks: tuple[Chunk, ...], sequences: Sequence[DeviceSequence], block_size: int, vocab_size: int
    ) -> None:
        """``sequences[b]`` is the one that ``chunks[b]`` names.

        Raises:
            IndexError: a token is not of the vocabulary.
        """
        self.chunks = chunks
        self.sequences = sequences
        self._block_size = block_size
        self.lengths = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int64)
        self.starts = np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)
        self.is_decode = all(
            chunk.num_tokens == 1 and chunk.samples and len(sequence.choices) == 1
            for chunk, sequence in zip(chunks, sequences, strict=True)
        )
        self.sampled = [s for chunk, s in zip(chunks, sequences, strict=True) if chunk.samples]
        self.tokens = self._known_tokens(vocab_size)
        self.prompt_rows = self._prompt_rows() if not self.is_decode else []
        self.num_scored = sum(last - first for _, first, last in self.prompt_rows)
        self.draw_rows: Tensor | None = None

    def prepare(self, vocab_size: int, upload: Callable[[Array], Tensor], *, draws: bool = True) -> None:
        """Bring to the device where tokens go and, if it ``draws``, what drawing needs.

        ``penalties`` of the sequences are made then.
        """
        owners = [(row, sequence) for row, sequence in enumerate(self.sampled) for _ in sequence.choices]
        self.draw_slots = upload(np.array([sequence.slot for _, sequence in owners], dtype=np.int64))
        if not draws:
            return
        choices = [choice for sequence in self.sampled for choice in sequence.choices]
        self.sampler = DeviceSampler(
            [
                DeviceRow(sequence.sampling, choice, sequence.num_output, sequence.penalties)
                for (_, sequence), choice in zip(owners, choices, strict=True)
            ],
            vocab_size,
            upload,
        )
        if len(owners) != len(self.sampled):
            self.draw_rows = upload(np.array([row for row, _ in owners], dtype=np.int64))

    def _known_tokens(self, vocab_size: int) -> Ints:
        pieces = []
        for sequence, first, length in zip(self.sequences, self.starts, self.lengths, strict=True):
            known = sequence.known[first : first + length]
            # A token that the host does not know is the newest, drawn by an earlier step.
            assert len(known) == length or (length == 1 and first == sequence.num_tokens - 1)
            pieces.append(known if len(known) else _UNKNOWN_TOKEN)
        tokens = np.concatenate(pieces)
        is_known = np.repeat(self.starts < [len(s.known) for s in self.sequences], self.lengths)
        if np.any(is_known & ((tokens < 0) | (tokens >= vocab_size))):
            raise IndexError(f"a token is not of the vocabulary of {vocab_size}")
        return tokens

    def _prompt_rows(self) -> list[tuple[DeviceSequence, int, int]]:
        spans = []
        for sequence, start, length in zip(self.sequences, self.starts.tolist(), self.lengths.tolist(), strict=True):
            first = max(sequence.prompt_logprobs_from, start) + 1
            last = min(start + length + 1, sequence.num_prompt)
            if first < last:
                spans.append((sequence, first, last))
        return spans

    @property
    def tables(self) -> NDArray[np.int32]:
        """Block tables [B, blocks of the longest]."""
        tables = np.zeros((len(self.sequences), max(s.num_blocks for s in self.sequences)), dtype=np.int32)
        for row, sequence in zip(tables, self.sequences, strict=True):
            row[: sequence.num_blocks] = sequence.blocks[: sequence.num_blocks]
        return tables

    def can_repeat(self, chunks: tuple[Chunk, ...]) -> bool:
        """Whether a step over ``chunks`` is the same decode batch, one token further."""
        return self.is_decode and (chunks is self.chunks or chunks == self.chunks)

    def advance(self, updates: Sequence[TableUpdate]) -> Ints:
        """Move a decode batch on; returns the entries of its tables that change, (row, column, block) [3, n]."""
        self.starts += 1
        self.tokens[:] = UNKNOWN
        if not updates:
            return np.empty((3, 0), dtype=np.int64)
        rows = {sequence.seq_id: row for row, sequence in enumerate(self.sequences)}
        entries = [
            (rows[update.seq_id], update.start + i, block)
            for update in updates
            if update.seq_id in rows
            for i, block in enumerate(update.blocks)
        ]
        return np.array(entries, dtype=np.int64).reshape(-1, 3).T.copy()

    def launched(self) -> None:
        """Note that the step is on its way."""
        for sequence, length in zip(self.sequences, self.lengths.tolist(), strict=True):
            sequence.num_computed += length
        for sequence in self.sampled:
            # A sequence that is sampled several times ends there: none of the tokens is its next.
            if len(sequence.choices) == 1:
                sequence.num_output += 1

    def inputs(self, last_tokens: Tensor, upload: Callable[[Array], Tensor]) -> StepInputs:
        """The model's inputs, on the device; ``last_tokens`` has what the host does not know, by slot."""
        lengths, starts = self.lengths, self.starts
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
        tables = self.tables
        owners = np.repeat(np.arange(len(lengths)), lengths)
        blocks = tables[owners, positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size
        row_of = {id(sequence): row for row, sequence in enumerate(self.sequences)}
        wanted: list[Ints] = []
        for sequence, first, last in self.prompt_rows:
            row = row_of[id(sequence)]
            wanted.append(np.arange(first, last) - 1 - starts[row] + offsets[row])
        samples = np.array([chunk.samples for chunk in self.chunks])
        sequence_slots = np.array([sequence.slot for sequence in self.sequences])[owners]
        tokens, places, kv_slots, sources = upload(np.stack([self.tokens, positions, slots, sequence_slots]))
        return StepInputs(
            tokens=fill_unknown(tokens, last_tokens, sources) if (self.tokens == UNKNOWN).any() else tokens,
            positions=places,
            logits_rows=upload(np.concatenate([*wanted, offsets[1:][samples] - 1]).astype(np.int64)),
            slots=kv_slots,
            block_tables=upload(tables),
            query_starts=upload(offsets.astype(np.int32)),
            context_lens=upload((starts + lengths).astype(np.int32)),
        )


def fill_unknown(tokens: Tensor, last_tokens: Tensor, sources: Tensor) -> Tensor:
    """``tokens`` [T], those that are UNKNOWN taken from ``last_tokens[sources]``."""
    return last_tokens.index_select(0, sources).where(tokens == UNKNOWN, tokens)
