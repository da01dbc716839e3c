"""One rank's engine on a device of its own, where an instance has several ranks.

As :class:`distserve.engine.group.shard_worker.ShardWorker`, with steps launched and not waited for, and decode steps
replayed from graphs. The sums of a stage's shards are in the graphs; what stages hand on goes between them.

Shards of one stage learn the tokens from the first on the device, in every step, so the next step can be launched
before the host knows them. Stages of a pipeline learn them from the host: the first stage does not wait on its device
for the last one, but computes other batches meanwhile.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.events import StepDone, StepFailed
from distserve.engine.device.backend import Backend
from distserve.engine.device.completions import Completions
from distserve.engine.device.experts import use_grouped_experts
from distserve.engine.device.norms import fuse_norms
from distserve.engine.device.part import Part
from distserve.engine.device.runner import DeviceRunner
from distserve.engine.device.start import capture_graphs, make_pool
from distserve.engine.group.loaded_part import LoadedPart, load_part
from distserve.engine.sharding.meeting import Meeting
from distserve.engine.sharding.stage import try_stage
from distserve.engine.verify import check_agreement


class DeviceShardWorker:
    """A loaded part of a model on a device, with the KV pool of its layers and heads."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        kv: KvConfig,
        parallel: ParallelConfig,
        rank: int,
        meeting: Meeting,
        backend: Backend,
        timeout: float,
        kv_buffer: Tensor | None = None,
        max_batch_size: int = 64,
    ) -> None:
        """Load rank ``rank``'s part, while the other ranks load theirs.

        Args:
            backend: the rank's device.
            kv_buffer: memory for the pool on it; None allocates it.
            max_batch_size: the largest decode batch that is captured, the same on all ranks; 0 captures none.
            model_dir: as the rest, as of :func:`distserve.engine.group.loaded_part.load_part`.
            dtype: see there.
            kv: see there.
            parallel: see there.
            rank: see there.
            meeting: see there.
            timeout: see there.

        Raises:
            ConfigError: the model directory is damaged, the shape does not divide the model, or there is no room.
            UnsupportedModelError: the model cannot be served exactly, or only by one rank.
            PeerError: another rank is gone.
        """
        self._backend = backend
        try:
            with backend.scope():
                part = load_part(
                    model_dir,
                    dtype=dtype,
                    kv=kv,
                    parallel=parallel,
                    rank=rank,
                    meeting=meeting,
                    device=backend.device,
                    timeout=timeout,
                    make_pool=lambda layout: make_pool(layout, kv_buffer, backend),
                )
                self._runner = _start(part, backend, max_batch_size)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{backend.device} has no room for rank {rank}: give the instance fewer KV blocks, a smaller "
                f"max_batch_size or more ranks ({error})"
            ) from error
        self.kv = part.kv
        self._draws = part.shard.samples
        self._completions: Completions | None = None

    @property
    def layout(self) -> KvLayout:
        """Shape and type of the KV pool."""
        return self.kv.layout

    def open(self, command: OpenSequence) -> None:
        """Take a sequence on."""
        self._runner.open(command)

    def close(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._runner.close(seq_id)

    def launch(
        self,
        step: RunStep,
        on_done: Callable[[StepDone | StepFailed], None],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Launch this rank's part; the rank that draws tells ``on_done`` the outcome, from another thread.

        ``on_layer(l)`` is called once the writing of the rank's own layer l's KV has been launched.

        Raises:
            PeerError: another rank is gone.
        """
        pending = self._runner.launch(step, on_layer)
        if not self._draws:
            return
        if self._completions is None:
            self._completions = Completions()
        self._completions.put(pending, on_done)

    def record(self, step_id: int, tokens: tuple[int, ...]) -> None:
        """Learn the tokens that a step drew, before a step that needs them."""
        self._runner.record(step_id, tokens)

    def shutdown(self) -> None:
        """End the thread that waits for steps once they are over, if ever: those of a lost rank are not."""
        if self._completions is not None:
            self._completions.end()
            self._completions = None


@torch.inference_mode()
def _start(part: LoadedPart, backend: Backend, max_batch_size: int) -> DeviceRunner:
    """Try the part with those of the other ranks, and capture its decode steps of up to ``max_batch_size``.

    Trials take every way that ranks speak to each other in a step: NCCL, which sets up a way when it is first taken,
    has done so when it is captured.
    """
    model, shard = part.model, part.shard
    config = model.module.config
    trial = try_stage(model)
    use_grouped_experts(model.module)
    fuse_norms(model.module)
    check_agreement(model, trial, part.kv, config.model_type)
    graphs = capture_graphs(model, part.kv, backend, config, max_batch_size, model) if max_batch_size else None
    share = part.comm.broadcast if shard.parallel.pp == 1 else None
    return DeviceRunner(
        model, part.kv, backend, vocab_size=config.vocab_size, graphs=graphs, part=Part(shard.samples, share)
    )
