"""One rank's engine on a CPU where an instance has several: its part of every step, in the order rank 0 gives.

Like :class:`distserve.engine.worker.Worker`, with the step in two halves: :meth:`ShardWorker.run` computes, and
:meth:`ShardWorker.record` tells every rank the tokens that one of them drew. Between the two, other batches may run: as
many as there are pipeline stages are on their way at once.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.events import StepDone, StepFailed
from distserve.engine.batch import Batch
from distserve.engine.group.loaded_part import load_part
from distserve.engine.kv import KvPool
from distserve.engine.sequences import SequenceState
from distserve.engine.sharding.meeting import Meeting
from distserve.engine.sharding.stage import try_stage
from distserve.engine.verify import check_agreement
from distserve.engine.worker import draw_tokens

_CPU = torch.device("cpu")


class ShardWorker:
    """A loaded part of a model with the KV pool of its layers and heads, and the sequences open on the instance."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        kv: KvConfig,
        parallel: ParallelConfig,
        rank: int,
        meeting: Meeting,
        timeout: float,
        kv_buffer: Tensor | None = None,
    ) -> None:
        """Load rank ``rank``'s part of the model in ``model_dir``, while the other ranks load theirs.

        Args:
            model_dir: a Hugging Face directory.
            dtype: of weights, activations and KV.
            kv: blocks of the pool, the same on all ranks.
            parallel: the instance's shape.
            rank: which rank this is.
            meeting: where they find each other.
            timeout: seconds to wait for a rank that is alive but silent.
            kv_buffer: memory for the pool; None allocates it.

        Raises:
            ConfigError: the model directory is damaged, or the shape does not divide the model.
            UnsupportedModelError: the model cannot be served exactly, or only by one rank.
            PeerError: another rank is gone.
        """
        part = load_part(
            model_dir,
            dtype=dtype,
            kv=kv,
            parallel=parallel,
            rank=rank,
            meeting=meeting,
            device=_CPU,
            timeout=timeout,
            make_pool=lambda layout: KvPool(layout, kv_buffer),
        )
        self.description, self.shard, self.kv, self._model = part.description, part.shard, part.kv, part.model
        trial = try_stage(self._model)
        check_agreement(self._model, trial, self.kv, self._model.module.config.model_type)
        self._sequences: dict[int, SequenceState] = {}
        self._batches: list[Batch] = []
        self._running: dict[int, Batch] = {}

    @property
    def layout(self) -> KvLayout:
        """Shape and type of the KV pool."""
        return self.kv.layout

    def open(self, command: OpenSequence) -> None:
        """Take a sequence on."""
        assert command.seq_id not in self._sequences
        self._sequences[command.seq_id] = SequenceState(command, self.layout.block_size)

    def close(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._sequences[seq_id]

    @torch.inference_mode()
    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone | None:
        """Run this rank's part; the outcome on the rank that draws the tokens, None on the others.

        ``on_layer(l)`` is called once the KV of the rank's own layer l is in the pool. The tokens of earlier steps of
        the same sequences have been recorded.

        Raises:
            PeerError: another rank is gone.
        """
        if step.copies:
            self.kv.copy(step.copies)
        for update in step.tables:
            self._sequences[update.seq_id].update_blocks(update)
        if not step.chunks:
            return StepDone(step.step_id, ()) if self.shard.samples else None
        batch = self._batch_for(step)
        self._running[step.step_id] = batch
        logits = self._model(batch.inputs, on_layer)
        if not self.shard.samples:
            return None
        assert logits is not None
        return draw_tokens(batch, logits, step.step_id)[0]

    def launch(
        self,
        step: RunStep,
        on_done: Callable[[StepDone | StepFailed], None],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """As :meth:`run`; the rank that draws tells ``on_done`` the outcome."""
        done = self.run(step, on_layer)
        if done is not None:
            on_done(done)

    def shutdown(self) -> None:
        """Nothing is on its way."""

    def record(self, step_id: int, tokens: tuple[int, ...]) -> None:
        """Note the tokens that a step drew."""
        batch = self._running.pop(step_id, None)
        if batch is None:
            return  # a step without chunks
        batch.record(np.array(tokens, dtype=np.int64))
        if batch not in self._batches:
            batch.commit()

    def _batch_for(self, step: RunStep) -> Batch:
        for batch in self._batches:
            if batch.can_repeat(step.chunks):
                assert batch not in self._running.values()
                batch.advance(step.tables)
                return batch
        # A batch that is not on its way is over: its sequences may be in another one from now on.
        running = [batch for batch in self._batches if batch in self._running.values()]
        for batch in self._batches:
            if batch not in running:
                batch.commit()
        sequences = [self._sequences[chunk.seq_id] for chunk in step.chunks]
        new = Batch(step.chunks, sequences, self.layout.block_size, self.description.vocab_size)
        self._batches = [*running, new]
        return new
