"""The bridge from transformers' attention layers to paged attention.

transformers calls the attention function that a model's configuration names; ours is registered under
:data:`IMPLEMENTATION` and hands the call on to the object that the forward pass was given as ``paged``. No mask
function is registered under that name, so transformers builds no mask: causality and sliding windows are the paged
kernel's business.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from distserve.core.errors import UnsupportedModelError
from distserve.engine.inputs import StepInputs
from distserve_kernels import paged_attention, write_kv

IMPLEMENTATION = "distserve_paged"
"""Name of our attention function in transformers' AttentionInterface."""


class PagedCall(Protocol):
    """What a forward pass does for each attention layer."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, object]) -> Tensor:
        """Attention of query [1, H, T, D] over this step's key and value [1, K, T, D] and all before: [1, T, H, D].

        ``kwargs`` are what the layer passes by name: ``scaling``, ``sliding_window``, ``softcap``, ``s_aux``, ...
        """
        ...


class PagedAttention:
    """Attention over a paged cache for one step's batch; calls ``on_layer(l)`` once layer l's KV is written."""

    def __init__(
        self,
        inputs: StepInputs,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        on_layer: Callable[[int], None] | None,
    ) -> None:
        self.inputs = inputs
        self.keys = keys
        self.values = values
        self.on_layer = on_layer

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, object]) -> Tensor:
        """See :class:`PagedCall`."""
        inputs = self.inputs
        layer: int = module.layer_idx  # type: ignore[assignment]
        k_cache, v_cache = self.keys[layer], self.values[layer]
        write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, inputs.slots)
        if self.on_layer is not None:
            self.on_layer(layer)
        scale = kwargs.get("scaling")
        attended = paged_attention(
            query[0].transpose(0, 1),
            k_cache,
            v_cache,
            inputs.block_tables,
            inputs.query_starts,
            inputs.context_lens,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,  # type: ignore[arg-type]
            sliding_window=kwargs.get("sliding_window"),  # type: ignore[arg-type]
            softcap=kwargs.get("softcap"),  # type: ignore[arg-type]
            sinks=kwargs.get("s_aux"),  # type: ignore[arg-type]
        )
        return attended.unsqueeze(0)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedCall | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The call of transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    if paged is None:
        raise UnsupportedModelError("the model cannot be served: it passes no keyword arguments on to its attention")
    if attention_mask is not None:
        raise UnsupportedModelError("the model cannot be served: it masks attention in a way of its own")
    return paged.attend(module, query, key, value, kwargs), None


AttentionInterface.register(IMPLEMENTATION, _attention_function)
