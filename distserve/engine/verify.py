"""The last word on whether a loaded model can be served exactly: it is tried.

A few tokens go through the model's own attention at once, and through the paged path in pieces beside another
sequence. Position biases, masks or states that the paged path does not know of show as a difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.engine.attention import IMPLEMENTATION
from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool
from distserve.engine.masks import MaskRecorder, recorded_masks

_LENGTH = 24
_LEAST_LENGTH = 6
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Relative difference of logits that rounding may cause; the median over positions is compared with it, since an
expert chosen differently by rounding may throw single positions far off."""
_KNOWN_ARGUMENTS = {
    "dropout",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
    "use_cache",
}


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """How a layer asks for its attention; see :func:`distserve_kernels.paged_attention`."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """What a module's own attention made of the trial's ``tokens`` [T], and each layer's settings.

    ``logits`` are [T, V], or None on a rank whose part of the model computes none.
    """

    tokens: Tensor
    logits: Tensor | None
    settings: tuple[AttentionSettings, ...]


@torch.inference_mode()
def run_trial(module: PreTrainedModel, kv: KvPool) -> Trial:
    """Run the trial tokens through the model's own attention, and see how its layers call it.

    Raises:
        UnsupportedModelError: it calls attention in a way that the paged path does not cover.
        ConfigError: the logits are not finite, or the pool has no room for a trial.
    """
    config: Any = module.config
    tokens = trial_tokens(config.vocab_size, config.max_position_embeddings, kv).to(kv.blocks.device)
    positions = torch.arange(len(tokens), device=tokens.device).unsqueeze(0)
    recorder = AttentionRecorder(module.config.model_type, kv)
    module(input_ids=tokens.unsqueeze(0), position_ids=positions, use_cache=False, paged=recorder)
    recorder.check_layers()
    with recorded_masks(module, len(tokens)) as masks:
        module(input_ids=tokens.unsqueeze(0), position_ids=positions, use_cache=False, paged=masks)
    recorder.check_windows(masks)
    module.set_attn_implementation("eager")
    logits: Tensor = module(input_ids=tokens.unsqueeze(0), position_ids=positions, use_cache=False).logits[0].clone()
    module.set_attn_implementation(IMPLEMENTATION)
    check_finite(logits)
    return Trial(tokens, logits, tuple(recorder.settings))


def check_finite(logits: Tensor) -> None:
    """Raise ConfigError if not all ``logits`` are finite."""
    if not bool(logits.isfinite().all()):
        raise ConfigError("the model computes logits that are not finite numbers: its weights are damaged")


@torch.inference_mode()
def check_agreement(
    model: Callable[[StepInputs, None], Tensor | None], trial: Trial, kv: KvPool, model_type: str
) -> None:
    """Compare the paged path of a language model with what a trial gave: on a rank without logits, just run it.

    Leaves the first blocks of the pool with trial data.

    Raises:
        UnsupportedModelError: the two differ by more than rounding.
    """
    expected, tokens = trial.logits, trial.tokens.cpu()
    num_tokens = len(tokens)
    borders = [0, num_tokens // 3, num_tokens - 2, num_tokens - 1, num_tokens]
    # The other sequence runs the same tokens one piece behind, so its context is another length in every step.
    pieces = list(pairwise(borders))
    found = None if expected is None else torch.empty_like(expected)
    for own, other in zip([*pieces, None], [None, *pieces], strict=True):
        spans = [(row, *span) for row, span in ((0, own), (1, other)) if span is not None]
        logits = model(_trial_inputs(tokens, spans, kv).to(kv.blocks.device), None)
        if own is not None and found is not None and logits is not None:
            found[own[0] : own[1]] = logits[: own[1] - own[0]]
    if found is None or expected is None:
        return
    difference = ((found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)).median().item()
    # Written so that a difference that is no number refuses, too.
    if not difference <= _TOLERANCE[kv.layout.dtype]:
        raise UnsupportedModelError(
            f"a {model_type} model cannot be served: computed in pieces over a paged cache its logits differ from "
            f"those of its own attention (by {difference:.2g}, relatively), so it must depend on more than it passes on"
        )


def trial_tokens(vocab_size: int, max_length: int, kv: KvPool) -> Tensor:
    """The tokens of a trial, [T].

    Raises:
        ConfigError: the pool has no room for one.
    """
    room = kv.layout.num_blocks // 2 * kv.layout.block_size
    if room < _LEAST_LENGTH:
        raise ConfigError(
            f"a KV pool of {kv.layout.num_blocks} blocks of {kv.layout.block_size} tokens is too small to serve from: "
            f"it needs at least {2 * _LEAST_LENGTH} tokens in an even number of blocks"
        )
    return (torch.arange(min(_LENGTH, room, max_length)) * 7919 + 5) % vocab_size


def _trial_inputs(tokens: Tensor, spans: list[tuple[int, int, int]], kv: KvPool) -> StepInputs:
    """Inputs for tokens ``[start, end)`` of trial sequences, given as (which, start, end)."""
    blocks_each = kv.layout.num_blocks // 2
    tables = torch.arange(2 * blocks_each, dtype=torch.int32).view(2, blocks_each)
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    which = torch.cat([torch.full((end - start,), row) for row, start, end in spans])
    block_size = kv.layout.block_size
    return StepInputs(
        tokens=tokens[positions],
        positions=positions,
        logits_rows=torch.arange(len(positions)),
        slots=tables[which, positions // block_size].long() * block_size + positions % block_size,
        block_tables=tables[[row for row, _, _ in spans]],
        query_starts=torch.from_numpy(np.cumsum([0] + [end - start for _, start, end in spans]).astype(np.int32)),
        context_lens=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
    )


class AttentionRecorder:
    """Stands in for paged attention and checks each layer's call; returns zeros.

    ``settings[l]`` is how layer l calls it.
    """

    def __init__(self, model_type: str, kv: KvPool) -> None:
        self.model_type = model_type
        self.layout = kv.layout
        self.layers: list[object] = []
        self.settings: list[AttentionSettings] = []

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """See :class:`distserve.engine.attention.PagedCall`; raises UnsupportedModelError."""
        self.layers.append(getattr(module, "layer_idx", None))
        unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _KNOWN_ARGUMENTS)
        if unknown:
            self._refuse(f"its attention takes {', '.join(unknown)}, which paged attention does not know")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            self._refuse("its attention is not causal")
        kv_shape = (1, self.layout.num_kv_heads, query.shape[2], self.layout.head_dim)
        if key.shape != kv_shape or value.shape != kv_shape or query.shape[3] != self.layout.head_dim:
            self._refuse(
                f"its attention has keys of shape {list(key.shape)} and values of shape {list(value.shape)} "
                f"where its configuration implies {list(kv_shape)}"
            )
        scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        default = self.layout.head_dim**-0.5
        self.settings.append(
            AttentionSettings(
                scale=default if scale is None else float(scale),
                sliding_window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                has_sinks=sinks is not None,
            )
        )
        return query.transpose(1, 2).new_zeros(1, query.shape[2], query.shape[1], query.shape[3])

    def check_layers(self) -> None:
        """Raise UnsupportedModelError unless each layer has called once, in order."""
        if self.layers != list(range(self.layout.num_layers)):
            self._refuse(f"not each of its {self.layout.num_layers} layers has one attention over its own KV cache")

    def check_windows(self, masks: MaskRecorder) -> None:
        """Raise UnsupportedModelError unless layers ask for the windows that their masks have."""
        if masks.windows != [settings.sliding_window or None for settings in self.settings]:
            self._refuse("the sliding windows that its layers ask for are not those of its attention masks")

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(f"a {self.model_type} model cannot be served: {reason}")
