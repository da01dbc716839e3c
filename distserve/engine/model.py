"""A language model as the worker sees it: a batch in, logits out, KV written on the way.

:class:`TransformersModel` runs any supported architecture through transformers' own class and defines the result;
faster implementations of the same interface must agree with it.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from distserve.engine.attention import PagedAttention
from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool


class LanguageModel(Protocol):
    """A decoder bound to a KV pool."""

    def __call__(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> Tensor:
        """Run the batch; returns logits [R, vocabulary] of ``inputs.logits_rows``.

        ``on_layer(l)`` is called once the KV of this step is in layer l's cache.
        """
        ...


class TransformersModel:
    """The reference implementation: transformers' module, its attention replaced by ours."""

    def __init__(self, module: PreTrainedModel, kv: KvPool) -> None:
        self.module = module
        self.kv = kv

    def __call__(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> Tensor:
        """See :class:`LanguageModel`."""
        output = self.module(
            input_ids=inputs.tokens.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=inputs.logits_rows,
            paged=PagedAttention(inputs, self.kv.keys, self.kv.values, on_layer),
        )
        logits: Tensor = output.logits[0]
        return logits
