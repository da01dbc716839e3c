"""Decode steps replayed from graphs, one per batch size of a ladder, over buffers that stay where they are.

A graph reads its tokens, positions and block tables from the buffers, and computes slots and lengths from them itself:
a step of an unchanged batch costs the host a copy of positions, a gather of tokens and one launch. Rows between the
batch and its rung are padding and store nothing that a sequence reads.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distserve.engine.device.backend import Array, Backend, Padding
from distserve.engine.device.batch import DeviceBatch, fill_unknown
from distserve.engine.device.ladder import rung_for
from distserve.engine.device.part import Stage
from distserve.engine.inputs import StepInputs

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-2
"""Relative difference of logits between a pass and its replay: the same kernels, whose sums may be in another order."""


class DecodeGraphs:
    """Captured decode steps of a model, and the buffers they read.

    Args:
        model: what is captured, unless there is a ``stage``.
        backend: where it runs.
        rungs: batch sizes, ascending; none are captured before :meth:`capture`.
        block_size: tokens per KV block.
        max_blocks: blocks of the longest sequence; a batch with a longer table is not :meth:`fits`.
        padding: what stands in rows without a sequence.
        stage: the rank's part of a pipeline, captured in place of ``model``. Its shards' sums are in the graphs; what
            goes from stage to stage is received before a replay and sent after it, so that no graph waits for another
            stage's.
    """

    def __init__(
        self,
        model: Callable[[StepInputs, None], Tensor | None],
        backend: Backend,
        *,
        rungs: Sequence[int],
        block_size: int,
        max_blocks: int,
        padding: Padding,
        stage: Stage | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._rungs = tuple(rungs)
        self._block_size = block_size
        self._padding = padding
        self._replays: dict[int, Callable[[], Tensor]] = {}
        size, device = self._rungs[-1], backend.device
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._positions = torch.full((size,), padding.position, dtype=torch.int64, device=device)
        self._tables = torch.full((size, max_blocks), padding.block, dtype=torch.int32, device=device)
        self._rows = torch.arange(size, device=device)
        self._starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._stage = stage
        self._entering = None if stage is None or stage.is_first else stage.entering_buffer(size)
        self._loaded: DeviceBatch | None = None

    def capture(self, vocab_size: int, num_blocks: int) -> None:
        """Capture all rungs, the largest first: the smaller ones find its memory.

        A model that cannot be captured, or whose graphs compute something else, is run without; a warning says so.
        Leaves trial data in the first of the pool's ``num_blocks`` blocks. Shards of a stage capture together, and do
        with graphs or without as one: sums within a graph are met by the same graph.
        """
        problem = self._capture()
        if not self._all_agree(not problem):
            self._replays.clear()
            problem = problem or "as another rank found"
            logger.warning("decode steps run without CUDA graphs, so slower: the model cannot be captured: %s", problem)
            return
        wrong = [rung for rung in self._rungs if rung <= num_blocks and not self._agrees(rung, vocab_size)]
        if not self._all_agree(not wrong):
            self._replays.clear()
            logger.warning("decode steps run without CUDA graphs, slower: replayed at %s they give other logits", wrong)

    def _capture(self) -> str:
        """Capture all rungs; returns why that cannot be, or nothing."""
        for rung in reversed(self._rungs):
            try:
                self._replays[rung] = self._backend.capture(lambda rung=rung: self._step(rung))  # type: ignore[misc]
            except RuntimeError as error:
                return str(error) or type(error).__name__
        return ""

    def _all_agree(self, is_so: bool) -> bool:
        return is_so if self._stage is None else self._stage.all_agree(is_so)

    def _agrees(self, rung: int, vocab_size: int) -> bool:
        """Whether a replay gives the logits of the pass itself, on other inputs than it was captured with."""
        rows = self._rows[:rung]
        self._tokens[:rung].copy_((rows * 7919 + 5) % vocab_size)
        self._positions[:rung].copy_(rows % self._block_size)
        self._tables[:rung, 0].copy_(rows)
        if self._entering is not None:
            width = torch.linspace(-1, 1, self._entering.shape[1], device=rows.device)
            self._entering[:rung].copy_((rows % 5 + 1).unsqueeze(1) * width)
        expected = self._step(rung).float().clone()
        difference = (self._replays[rung]().float() - expected).norm() / expected.norm()
        # Written so that a difference that is no number does not agree.
        return bool(difference <= _TOLERANCE)

    def fits(self, batch: DeviceBatch) -> bool:
        """Whether :meth:`run` takes the batch."""
        return (
            bool(self._replays)
            and batch.is_decode
            and len(batch.sequences) <= self._rungs[-1]
            and max(sequence.num_blocks for sequence in batch.sequences) <= self._tables.shape[1]
        )

    def run(self, batch: DeviceBatch, last_tokens: Tensor, changes: Array) -> Tensor | None:
        """Launch a decode step; returns logits [B, vocabulary], to be used before the next step is launched.

        None on a stage that is not the last.

        Args:
            batch: that :meth:`fits`.
            last_tokens: the newest token of each sequence that the host does not know, by slot.
            changes: what is new in the tables of a batch that was in the step before, (row, column, block) [3, n].
        """
        count = len(batch.sequences)
        rung = rung_for(self._rungs, count)
        assert rung is not None
        upload = self._backend.upload
        if batch is not self._loaded:
            self._load(batch, count, rung)
            tokens = fill_unknown(upload(batch.tokens), last_tokens, batch.draw_slots)
        else:
            if changes.size:
                rows, columns, blocks = upload(changes)
                self._tables.index_put_((rows, columns), blocks.int())
            tokens = last_tokens.index_select(0, batch.draw_slots)
        self._tokens[:count].copy_(tokens)
        self._positions[:count].copy_(upload(batch.starts))
        if self._stage is None:
            return self._replays[rung]()[:count]
        if self._entering is not None:
            self._entering[:count].copy_(self._stage.receive(count))
        output = self._replays[rung]()[:count]
        # What is sent is not to be overwritten by the next replay.
        return self._stage.hand_on(output if self._stage.is_last else output.clone())

    def _load(self, batch: DeviceBatch, count: int, rung: int) -> None:
        tables = self._backend.upload(batch.tables)
        self._tables[:count, : tables.shape[1]].copy_(tables)
        self._tables[count:rung, 0].fill_(self._padding.block)
        self._positions[count:rung].fill_(self._padding.position)
        self._tokens[count:rung].zero_()
        self._loaded = batch

    def _step(self, rung: int) -> Tensor:
        """The forward pass over the first ``rung`` rows of the buffers."""
        positions, tables = self._positions[:rung], self._tables[:rung]
        places = positions.clamp(min=0)
        blocks = tables.gather(1, (places // self._block_size).unsqueeze(1)).squeeze(1).long()
        slots = blocks * self._block_size + places % self._block_size
        inputs = StepInputs(
            tokens=self._tokens[:rung],
            positions=places,
            logits_rows=self._rows[:rung],
            slots=slots.masked_fill(positions < 0, -1),
            block_tables=tables,
            query_starts=self._starts[: rung + 1],
            context_lens=(positions + 1).int(),
        )
        if self._stage is not None:
            return self._stage.compute(inputs, None if self._entering is None else self._entering[:rung], None)
        logits = self._model(inputs, None)
        assert logits is not None, "a part of a model comes as a stage"
        return logits
