"""One pipeline stage's forward pass, and the trial of it that all ranks of an instance make together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distserve.engine.attention import IMPLEMENTATION, PagedAttention, PagedCall
from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool
from distserve.engine.masks import recorded_masks
from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.cut import Cut
from distserve.engine.verify import AttentionRecorder, Trial, check_finite, trial_tokens


class StageModel:
    """A rank's part of a model bound to a KV pool: activations or tokens in, activations or logits out."""

    def __init__(self, module: Any, cut: Cut, kv: KvPool, comm: Communicator, device: torch.device) -> None:
        """``module`` is moved to ``device``, where ``kv`` is."""
        self.module = module.to(device)
        self._device = device
        self.kv = kv
        self._cut = cut
        self._comm = comm

    @property
    def is_last(self) -> bool:
        """Whether a run gives logits."""
        return self._cut.shard.is_last

    @property
    def is_first(self) -> bool:
        """Whether it begins with tokens, and receives nothing."""
        return self._cut.shard.is_first

    @property
    def hidden_size(self) -> int:
        """Width of what stages hand on."""
        size: int = self.module.config.hidden_size
        return size

    def __call__(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> Tensor | None:
        """Run the batch; logits [R, vocabulary] on the last stage, None on others.

        ``on_layer(l)`` is called once the KV of the stage's own layer l is in the cache.

        Raises:
            PeerError: another rank is gone.
        """
        entering = None if self.is_first else self.receive(len(inputs.tokens))
        return self.hand_on(self.compute(inputs, entering, on_layer))

    def compute(self, inputs: StepInputs, entering: Tensor | None, on_layer: Callable[[int], None] | None) -> Tensor:
        """The stage's own work alone: ``entering`` [T, hidden], if it is not the first, to what :meth:`hand_on` takes.

        Shards of the stage add up on the way. So a graph may hold it, and what goes from stage to stage stays outside.
        """
        inputs = inputs.to(self._device)
        paged = PagedAttention(inputs, self.kv.keys, self.kv.values, on_layer)
        return self._compute(inputs.tokens, inputs.positions, inputs.logits_rows, entering, paged)

    def entering_buffer(self, num_tokens: int) -> Tensor:
        """Zeros [T, hidden] where the stage computes, for what the stage before makes of ``num_tokens`` tokens."""
        return torch.zeros((num_tokens, self.hidden_size), dtype=self.module.dtype, device=self._device)

    def all_agree(self, is_so: bool) -> bool:
        """Whether ``is_so`` on all shards of the stage. Waits for them.

        Raises:
            PeerError: another rank is gone.
        """
        return self._comm.all_agree(is_so, self._device)

    def receive(self, num_tokens: int) -> Tensor:
        """What the stage before made of the step's tokens, [T, hidden]; there is a stage before.

        Raises:
            PeerError: another rank is gone.
        """
        return self._comm.receive((num_tokens, self.hidden_size), self.module.dtype, self._device)

    def hand_on(self, output: Tensor) -> Tensor | None:
        """Send [T, hidden] to the next stage; the last one's are logits, which it returns as they are.

        ``output`` must stay as it is until two more have been handed on.

        Raises:
            PeerError: another rank is gone.
        """
        if self.is_last:
            return output
        self._comm.send(output)
        return None

    def forward(self, tokens: Tensor, positions: Tensor, logits_rows: Tensor, paged: PagedCall | None) -> Tensor | None:
        """As a call, with ``paged`` as the attention, or the module's own if there is none."""
        entering = None if self.is_first else self.receive(len(tokens))
        return self.hand_on(self._compute(tokens, positions, logits_rows, entering, paged))

    def _compute(
        self,
        tokens: Tensor,
        positions: Tensor,
        logits_rows: Tensor,
        entering: Tensor | None,
        paged: PagedCall | None,
    ) -> Tensor:
        cut = self._cut
        cut.entering = None if entering is None else entering.unsqueeze(0)
        tokens, positions = tokens.to(self._device), positions.to(self._device)
        logits_rows = logits_rows.to(self._device)
        more = {} if paged is None else {"paged": paged}
        output = self.module(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_rows if cut.shard.is_last else logits_rows[:0],
            **more,
        )
        cut.entering = None
        if cut.shard.is_last:
            logits: Tensor = output.logits[0]
            return logits
        assert cut.leaving is not None
        leaving, cut.leaving = cut.leaving, None
        return leaving[0]


@torch.inference_mode()
def try_stage(model: StageModel) -> Trial:
    """As :func:`distserve.engine.verify.run_trial`, on all ranks at once.

    Raises:
        UnsupportedModelError: it calls attention in a way that the paged path does not cover.
        ConfigError: the logits are not finite, or the pool has no room for a trial.
        PeerError: another rank is gone.
    """
    module, kv = model.module, model.kv
    config = module.config
    tokens = trial_tokens(config.vocab_size, config.max_position_embeddings, kv)
    positions = rows = torch.arange(len(tokens))
    recorder = AttentionRecorder(config.model_type, kv)
    model.forward(tokens, positions, rows, recorder)
    recorder.check_layers()
    with recorded_masks(module, len(tokens)) as masks:
        model.forward(tokens, positions, rows, masks)
    recorder.check_windows(masks)
    module.set_attn_implementation("eager")
    logits = model.forward(tokens, positions, rows, None)
    module.set_attn_implementation(IMPLEMENTATION)
    if logits is not None:
        logits = logits.clone()
        check_finite(logits)
    return Trial(tokens, logits, tuple(recorder.settings))
