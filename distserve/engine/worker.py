"""One rank's engine: executes a scheduler's steps on a model and reports the tokens.

A worker does what it is told: it allocates no blocks, chooses no batch, ends no sequence, and an error in a step is
raised to whoever runs it (who reports the step as failed).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.config import KvConfig, KvLayout
from distserve.core.errors import ConfigError
from distserve.core.events import StepDone
from distserve.core.request import TokenLogprobs
from distserve.engine.batch import Batch
from distserve.engine.description import describe_config, load_config
from distserve.engine.fused import FusedModel, can_fuse
from distserve.engine.kv import TORCH_DTYPES, KvPool
from distserve.engine.loader import load_module
from distserve.engine.model import LanguageModel, TransformersModel
from distserve.engine.sampling import token_logprobs
from distserve.engine.sequences import SequenceState
from distserve.engine.verify import check_agreement, run_trial


class Worker:
    """A loaded model with its KV pool and the sequences open on it.

    Sequences are named by the scheduler's ``seq_id``. A token that could not be drawn because its logits were not
    finite is reported as :data:`distserve.core.events.NOT_FINITE`; the other sequences of the step are well.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "float32",
        kv: KvConfig,
        kv_buffer: Tensor | None = None,
        num_threads: int | None = None,
        fused: bool = True,
    ) -> None:
        """Load the model in ``model_dir``.

        Args:
            model_dir: a Hugging Face directory.
            dtype: ``float32`` or ``bfloat16``, of weights, activations and KV.
            kv: size of the KV pool.
            kv_buffer: flat uint8 memory for it, ``layout.num_bytes`` long; None allocates it.
            num_threads: threads of this process that compute; None leaves torch's setting.
            fused: run on fused kernels where the model allows; False runs transformers' own modules, the reference.

        Raises:
            ConfigError: the model directory is missing, incomplete or damaged.
            UnsupportedModelError: the model cannot be served exactly.
        """
        if dtype not in TORCH_DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        path = Path(model_dir)
        config = load_config(path)
        self.description = describe_config(config, path)
        self.kv = KvPool(self.description.layout(kv, dtype), kv_buffer)
        module = load_module(config, path, dtype)
        trial = run_trial(module, self.kv)
        self._model: LanguageModel
        if fused and can_fuse(module, self.kv, trial.settings):
            self._model = FusedModel(module, self.kv, trial.settings)
        else:
            self._model = TransformersModel(module, self.kv)
        check_agreement(self._model, trial, self.kv, config.model_type)
        self._sequences: dict[int, SequenceState] = {}
        self._batch: Batch | None = None

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
    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone:
        """Copy blocks, update tables, run the forward pass over the chunks and draw the tokens they ask for.

        ``on_layer(l)`` is called once layer l's KV of this step is in the pool.
        """
        if step.copies:
            self.kv.copy(step.copies)
        for update in step.tables:
            self._sequences[update.seq_id].update_blocks(update)
        if not step.chunks:
            return StepDone(step.step_id, ())
        batch = self._next_batch(step)
        logits = self._model(batch.inputs, on_layer)
        done, tokens = draw_tokens(batch, logits, step.step_id)
        batch.record(tokens)
        return done

    def _next_batch(self, step: RunStep) -> Batch:
        batch = self._batch
        if batch is not None and batch.can_repeat(step.chunks):
            batch.advance(step.tables)
            return batch
        if batch is not None:
            batch.commit()
        sequences = [self._sequences[chunk.seq_id] for chunk in step.chunks]
        self._batch = Batch(step.chunks, sequences, self.layout.block_size, self.description.vocab_size)
        return self._batch


def draw_tokens(batch: Batch, logits: Tensor, step_id: int) -> tuple[StepDone, NDArray[np.int64]]:
    """What a step's logits [R, V] come to: its outcome, and the tokens drawn as ``batch.record`` takes them."""
    num_prompt_rows = sum(last - first for _, first, last in batch.prompt_rows)
    sampled = logits[num_prompt_rows:]
    if len(batch.draw_rows) != len(sampled):
        sampled = sampled[batch.draw_rows]
    prompt_logprobs = _prompt_logprobs(batch, logits[:num_prompt_rows])
    if len(sampled) == 0:
        return StepDone(step_id, (), None, prompt_logprobs), np.empty(0, dtype=np.int64)
    draw = batch.sampler(sampled)
    return StepDone(step_id, tuple(draw.tokens.tolist()), draw.logprobs, prompt_logprobs), draw.tokens.numpy()


def _prompt_logprobs(batch: Batch, logits: Tensor) -> tuple[tuple[int, tuple[TokenLogprobs, ...]], ...]:
    result, start = [], 0
    for sequence, first, last in batch.prompt_rows:
        rows = logits[start : start + last - first]
        tokens = torch.from_numpy(sequence.tokens[first:last])
        num_top = [sequence.sampling.prompt_logprobs or 0] * (last - first)
        result.append((sequence.seq_id, tuple(token_logprobs(rows, tokens, num_top))))
        start += last - first
    return tuple(result)
