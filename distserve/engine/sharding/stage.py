"""One pipeline stage's forward pass, and the trial of it that all ranks of an instance make together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distserve.engine.attention import IMPLEMENTATION, PagedAttention, PagedCall
from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool
from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.cut import Cut
from distserve.engine.verify import AttentionRecorder, Trial, check_agreement, check_finite, trial_tokens


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

    def __call__(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> Tensor | None:
        """Run the batch; logits [R, vocabulary] on the last stage, None on others.

        ``on_layer(l)`` is called once the KV of the stage's own layer l is in the cache.

        Raises:
            PeerError: another rank is gone.
        """
        inputs = inputs.to(self._device)
        paged = PagedAttention(inputs, self.kv.keys, self.kv.values, on_layer)
        return self.forward(inputs.tokens, inputs.positions, inputs.logits_rows, paged)

    def forward(self, tokens: Tensor, positions: Tensor, logits_rows: Tensor, paged: PagedCall | None) -> Tensor | None:
        """As a call, with ``paged`` as the attention, or the module's own if there is none."""
        cut, config = self._cut, self.module.config
        if not cut.shard.is_first:
            shape = (1, len(tokens), config.hidden_size)
            cut.entering = self._comm.receive(shape, self.module.dtype, self._device)
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
        self._comm.send(cut.leaving)
        cut.leaving = None
        return None


@torch.inference_mode()
def verify_stage(model: StageModel) -> None:
    """Compare the paged path with the sharded model's own attention, on all ranks at once.

    Raises:
        UnsupportedModelError: it calls attention in a way that the paged path does not cover, or the two differ.
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
    module.set_attn_implementation("eager")
    logits = model.forward(tokens, positions, rows, None)
    module.set_attn_implementation(IMPLEMENTATION)
    if logits is not None:
        logits = logits.clone()
        check_finite(logits)
    check_agreement(model, Trial(tokens, logits, tuple(recorder.settings)), kv, config.model_type)
