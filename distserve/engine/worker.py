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
from distserve.core.events import StepDone, StepFailed
from distserve.core.request import TokenLogprobs
from distserve.engine.batch import Batch
from distserve.engine.description import describe_config, load_config
from distserve.engine.device.backend import Backend
from distserve.engine.device.completions import Completions
from distserve.engine.device.runner import DeviceRunner
from distserve.engine.device.start import backend_for, load_runner
from distserve.engine.fused import FusedModel, can_fuse
from distserve.engine.kv import KvPool, check_dtype
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
        device: str = "cpu",
        max_batch_size: int = 64,
        graphs: bool = True,
        backend: Backend | None = None,
    ) -> None:
        """Load the model in ``model_dir``.

        Args:
            model_dir: a Hugging Face directory.
            dtype: ``float32`` or ``bfloat16``, on a GPU also ``float16``, of weights, activations and KV.
            kv: size of the KV pool.
            kv_buffer: flat uint8 memory for it on the device, ``layout.num_bytes`` long; None allocates it.
            num_threads: threads of this process that compute; None leaves torch's setting.
            fused: run on fused kernels where the model allows; False runs transformers' own modules, the reference.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            max_batch_size: on a GPU, the largest decode batch that graphs are captured for.
            graphs: on a GPU, run decode steps from captured graphs.
            backend: a device to run steps on as on a GPU, in place of ``device``: a rehearsal's.

        Raises:
            ConfigError: the model directory is missing, incomplete or damaged; there is no such device; or it has no
                room for weights and KV, with how much is missing.
            UnsupportedModelError: the model cannot be served exactly.
        """
        if backend is None:
            backend = backend_for(device)
        check_dtype(dtype, on_cpu=backend is None)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        path = Path(model_dir)
        config = load_config(path)
        self.description = describe_config(config, path)
        self._runner: DeviceRunner | None = None
        self._completions: Completions | None = None
        if backend is not None:
            self.kv, self._runner = load_runner(
                config,
                path,
                self.description,
                dtype=dtype,
                kv=kv,
                kv_buffer=kv_buffer,
                backend=backend,
                max_batch_size=max_batch_size,
                fused=fused,
                graphs=graphs,
            )
            return
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

    @property
    def is_asynchronous(self) -> bool:
        """Whether :meth:`launch` returns before the step is done."""
        return self._runner is not None

    def open(self, command: OpenSequence) -> None:
        """Take a sequence on."""
        if self._runner is not None:
            self._runner.open(command)
            return
        assert command.seq_id not in self._sequences
        self._sequences[command.seq_id] = SequenceState(command, self.layout.block_size)

    def close(self, seq_id: int) -> None:
        """Forget a sequence."""
        if self._runner is not None:
            self._runner.close(seq_id)
            return
        del self._sequences[seq_id]

    @torch.inference_mode()
    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone:
        """Copy blocks, update tables, run the forward pass over the chunks and draw the tokens they ask for.

        ``on_layer(l)`` is called once layer l's KV of this step is in the pool; on a GPU, once the writing of it has
        been launched, so that what the call puts on the current stream comes after it.
        """
        if self._runner is not None:
            return self._runner.launch(step, on_layer).wait()
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

    def launch(
        self,
        step: RunStep,
        on_done: Callable[[StepDone | StepFailed], None],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Start a step; ``on_done`` is told its outcome, on a GPU from another thread and after this has returned.

        Further steps may be launched meanwhile, also of the same sequences: their tokens are on the device.
        """
        if self._runner is None:
            on_done(self.run(step, on_layer))
            return
        if self._completions is None:
            self._completions = Completions()
        self._completions.put(self._runner.launch(step, on_layer), on_done)

    def shutdown(self) -> None:
        """Wait for the steps that were launched, and end the thread that waits for them."""
        if self._completions is not None:
            self._completions.close()
            self._completions = None

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
