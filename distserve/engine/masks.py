"""Which layers are windowed by the mask that transformers makes for them, whatever they say to their attention.

Some models window a layer by its mask alone and pass no window on, others pass one that their mask does not have. A
trial is shorter than most windows, so the configuration's is made shorter while the masks are looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from distserve.engine.attention import IMPLEMENTATION

_PROBE = "distserve_probe"


class MaskRecorder:
    """Stands in for attention; ``windows[l]`` are the tokens that layer l's mask shows a query, None for all of them.

    ``window``: the configuration's, in place of the shorter one that masks are made for meanwhile.
    """

    def __init__(self, window: int | None) -> None:
        self.windows: list[int | None] = []
        self._window = window

    def attend(
        self,
        module: nn.Module,  # noqa: ARG002  the interface's
        query: Tensor,
        key: Tensor,  # noqa: ARG002
        value: Tensor,  # noqa: ARG002
        kwargs: dict[str, Any],
    ) -> Tensor:
        """See :class:`distserve.engine.attention.PagedCall`; ``attention_mask`` [1, 1, T, T] is 0 where it attends."""
        mask = kwargs["attention_mask"]
        hides_first = mask is not None and bool(mask[0, 0, -1, 0] != 0)
        self.windows.append(self._window if hides_first else None)
        return torch.zeros_like(query.transpose(1, 2))


@contextmanager
def recorded_masks(module: PreTrainedModel, num_tokens: int) -> Iterator[MaskRecorder]:
    """Within, forward passes of ``num_tokens`` tokens that are given the recorder as ``paged`` show it their masks."""
    config: Any = module.config
    window = getattr(config, "sliding_window", None)
    try:
        if window:
            config.sliding_window = num_tokens // 2
        module.set_attn_implementation(_PROBE)
        yield MaskRecorder(window)
    finally:
        if window:
            config.sliding_window = window
        module.set_attn_implementation(IMPLEMENTATION)


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: MaskRecorder,
    **kwargs: object,
) -> tuple[Tensor, None]:
    return paged.attend(module, query, key, value, {**kwargs, "attention_mask": attention_mask}), None


AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, eager_mask)
