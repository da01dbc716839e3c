"""Executes a scheduler's steps on a device: launches each, and hands out its tokens when they have travelled.

Steps run in the order launched, and a step may be launched before the tokens of the one before it are known: they are
on the device, where it reads them. Blocks, batches and the ends of sequences are the scheduler's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.events import StepDone
from distserve.core.request import TokenLogprobs
from distserve.engine.device.backend import Array, Backend, Download
from distserve.engine.device.batch import DeviceBatch
from distserve.engine.device.decode import DecodeGraphs
from distserve.engine.device.part import ALONE, Part
from distserve.engine.device.penalties import make_row
from distserve.engine.device.sequences import DeviceSequence
from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool
from distserve.engine.sampling.logprobs import ROWS_AT_ONCE, Scores, entries, score
from distserve.engine.sampling.penalties import has_penalties

_FIRST_SLOTS = 64

Model = Callable[[StepInputs, Callable[[int], None] | None], Tensor | None]
"""A :class:`distserve.engine.model.LanguageModel`, or a rank's part of one, which may give no logits."""


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was launched, and what is to be made of what it brings to the host."""

    step_id: int
    _download: Download
    _scored_rows: Sequence[int]
    _num_top: Sequence[int]
    _prompts: Sequence[tuple[int, int, int]]
    """(seq_id, tensors' groups of 4, alternatives wanted) of each prompt whose tokens are scored"""

    def wait(self) -> StepDone:
        """The step's outcome, once it is known; from any thread.

        Raises RuntimeError if the device has failed.
        """
        tokens, *rest = self._download.wait()
        drawn = tuple(tokens.tolist())
        logprobs: tuple[TokenLogprobs | None, ...] | None = None
        if self._scored_rows:
            by_row = dict(zip(self._scored_rows, entries(Scores(*rest[:4]), self._num_top), strict=True))
            logprobs = tuple(by_row.get(row) for row in range(len(drawn)))
            del rest[:4]
        prompts = []
        for seq_id, num_groups, num_top in self._prompts:
            found: list[TokenLogprobs] = []
            for _ in range(num_groups):
                scores = Scores(*rest[:4])
                found += entries(scores, [num_top] * len(scores.chosen))
                del rest[:4]
            prompts.append((seq_id, tuple(found)))
        return StepDone(self.step_id, drawn, logprobs, tuple(prompts))


class DeviceRunner:
    """A model on a device with the sequences open on it. Methods are for one thread."""

    def __init__(
        self,
        model: Model,
        kv: KvPool,
        backend: Backend,
        *,
        vocab_size: int,
        graphs: DecodeGraphs | None,
        part: Part = ALONE,
    ) -> None:
        """``graphs`` are captured; None runs every step as it is. ``part`` is the rank's in its instance."""
        self._model = model
        self._part = part
        self._not_recorded: dict[int, Tensor] = {}
        self._kv = kv
        self._backend = backend
        self._vocab_size = vocab_size
        self._graphs = graphs
        self._sequences: dict[int, DeviceSequence] = {}
        self._batch: DeviceBatch | None = None
        self._free_slots: list[int] = []
        with backend.scope():
            self._last_tokens = torch.zeros(0, dtype=torch.int64, device=backend.device)
            self._extend_slots(_FIRST_SLOTS)

    def open(self, command: OpenSequence) -> None:
        """Take a sequence on."""
        assert command.seq_id not in self._sequences
        if not self._free_slots:
            with self._backend.scope():
                self._extend_slots(2 * len(self._last_tokens))
        self._sequences[command.seq_id] = DeviceSequence(command, self._free_slots.pop())

    def close(self, seq_id: int) -> None:
        """Forget a sequence; steps that were launched with it may still run."""
        # What reads or writes the slot was launched before whatever its next owner will.
        self._free_slots.append(self._sequences.pop(seq_id).slot)

    @torch.inference_mode()
    def launch(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> PendingStep:
        """Launch a step behind those before it, without waiting for any.

        ``on_layer(l)`` is called within the backend's scope once the writing of layer l's KV has been launched: what is
        recorded on the current stream then comes after it. On a rank that does not draw, the outcome has no tokens.
        """
        backend = self._backend
        with backend.scope():
            if step.copies:
                sources, destinations = backend.upload(np.array(step.copies, dtype=np.int64).T.copy())
                self._kv.copy_blocks(sources, destinations)
            for update in step.tables:
                self._sequences[update.seq_id].update_blocks(update)
            if not step.chunks:
                return PendingStep(step.step_id, backend.download([self._last_tokens[:0]]), (), (), ())
            batch, changes = self._next_batch(step)
            logits = self._forward(batch, changes, on_layer)
            pending = self._follow(step.step_id, batch) if logits is None else self._draw(step.step_id, batch, logits)
            batch.launched()
            return pending

    @torch.inference_mode()
    def record(self, step_id: int, tokens: Sequence[int]) -> None:
        """Bring to the device what another rank drew in a step, if nothing else does."""
        slots = self._not_recorded.pop(step_id, None)
        if slots is not None:
            with self._backend.scope():
                self._take(slots, self._backend.upload(np.array(tokens, dtype=np.int64)))

    def _next_batch(self, step: RunStep) -> tuple[DeviceBatch, Array]:
        batch = self._batch
        if batch is not None and batch.can_repeat(step.chunks):
            return batch, batch.advance(step.tables)
        # A step that fails leaves no batch behind that might be repeated.
        self._batch = None
        sequences = [self._sequences[chunk.seq_id] for chunk in step.chunks]
        batch = DeviceBatch(step.chunks, sequences, self._kv.layout.block_size, self._vocab_size)
        for sequence in batch.sampled:
            if self._part.draws and sequence.penalties is None and has_penalties(sequence.sampling):
                output = sequence.known[sequence.num_prompt :]
                sequence.penalties = make_row(sequence.prompt, output, self._vocab_size, self._backend.upload)
        batch.prepare(self._vocab_size, self._backend.upload, draws=self._part.draws)
        self._batch = batch
        return batch, np.empty((3, 0), dtype=np.int64)

    def _forward(self, batch: DeviceBatch, changes: Array, on_layer: Callable[[int], None] | None) -> Tensor | None:
        if self._graphs is None or not self._graphs.fits(batch):
            logits = self._model(batch.inputs(self._last_tokens, self._backend.upload), on_layer)
        else:
            logits = self._graphs.run(batch, self._last_tokens, changes)
            if on_layer is not None:
                for layer in range(self._kv.layout.num_layers):
                    on_layer(layer)
        return logits if self._part.draws else None

    def _follow(self, step_id: int, batch: DeviceBatch) -> PendingStep:
        """Learn what another rank draws, now or when it is recorded."""
        if len(batch.draw_slots) > 0:
            if self._part.share is None:
                self._not_recorded[step_id] = batch.draw_slots
            else:
                self._take(batch.draw_slots, self._part.share(torch.empty_like(batch.draw_slots)))
        return PendingStep(step_id, self._backend.download([self._last_tokens[:0]]), (), (), ())

    def _take(self, slots: Tensor, tokens: Tensor) -> None:
        """``tokens`` [S] are the newest of the sequences at ``slots`` [S]."""
        self._last_tokens.index_copy_(0, slots, tokens.clamp(min=0))

    def _draw(self, step_id: int, batch: DeviceBatch, logits: Tensor) -> PendingStep:
        prompts, scores = self._score_prompts(batch, logits)
        sampled = logits[batch.num_scored :]
        if batch.draw_rows is not None:
            sampled = sampled.index_select(0, batch.draw_rows)
        if len(sampled) == 0:
            return PendingStep(step_id, self._backend.download([self._last_tokens[:0], *scores]), (), (), prompts)
        draw = batch.sampler(sampled)
        tokens = draw.tokens if self._part.share is None else self._part.share(draw.tokens)
        self._take(batch.draw_slots, tokens)
        if draw.scores is not None:
            scores = [*draw.scores.tensors, *scores]
        download = self._backend.download([tokens, *scores])
        return PendingStep(step_id, download, batch.sampler.scored_rows, batch.sampler.num_top, prompts)

    def _score_prompts(self, batch: DeviceBatch, logits: Tensor) -> tuple[list[tuple[int, int, int]], list[Tensor]]:
        prompts: list[tuple[int, int, int]] = []
        scores: list[Tensor] = []
        start = 0
        for sequence, first, last in batch.prompt_rows:
            num_top = sequence.sampling.prompt_logprobs or 0
            rows = torch.split(logits[start : start + last - first], ROWS_AT_ONCE)
            tokens = torch.split(self._backend.upload(sequence.prompt[first:last]), ROWS_AT_ONCE)
            for piece, chosen in zip(rows, tokens, strict=True):
                scores += score(piece, chosen, num_top).tensors
            prompts.append((sequence.seq_id, len(rows), num_top))
            start += last - first
        return prompts, scores

    @torch.inference_mode()
    def _extend_slots(self, num_slots: int) -> None:
        old = self._last_tokens
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=old.device)
        self._last_tokens[: len(old)].copy_(old)
        self._free_slots += range(num_slots - 1, len(old) - 1, -1)
