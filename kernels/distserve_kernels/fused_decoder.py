"""A range of Llama-style decoder layers as one call.

Covers the dense, pre-norm family: RMS norms, rotary positions on the halves, grouped-query attention, SiLU-gated MLP;
optional biases and per-head query and key norms (Llama, Mistral, Qwen2, Qwen3 and their likes). It takes plain
tensors and knows nothing of checkpoints, schedulers or how its layers were cut out of a model.

Under tensor parallelism each rank builds it from its shard (its heads, its slice of the MLP) and passes an
``all_reduce`` that sums the two partial results of every layer.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from distserve_kernels.decoder_types import DecoderLayer, DecoderShape, StepInputs
from distserve_kernels.native_layers import ATTENTION_HALF, MLP_HALF, NativeLayers, layer_is_native
from distserve_kernels.ops import add_rms_norm, rms_norm
from distserve_kernels.torch_layer import TorchLayer


class FusedDecoder:
    """Decoder layers ready to run: native code where it supports them, this package's functions elsewhere.

    Native layers need caches of bfloat16 with contiguous blocks of a multiple of 16 tokens. An instance runs one
    step at a time.
    """

    def __init__(
        self,
        shape: DecoderShape,
        layers: Iterable[DecoderLayer],
        *,
        all_reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Packs the layers one by one, so that an iterator may load each when it is asked for and drop it after.

        Args:
            shape: sizes; heads and intermediate size are this rank's.
            layers: at least one.
            all_reduce: sums a tensor over the ranks in place; None for one rank.
        """
        self.shape = shape
        self.all_reduce = all_reduce
        iterator = iter(layers)
        first = next(iterator)
        self.is_native = layer_is_native(shape, first)
        self._native = NativeLayers(shape)
        self._torch: list[TorchLayer] = []
        self._num_layers = 0
        for layer in chain([first], iterator):
            if self.is_native:
                self._native.append(layer)
            else:
                self._torch.append(TorchLayer(shape, layer))
            self._num_layers += 1

    def __len__(self) -> int:
        """The number of layers."""
        return self._num_layers

    def __call__(
        self,
        hidden: Tensor,
        step: StepInputs,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        *,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Runs layers ``first`` to ``last`` (exclusive; all by default) on hidden [T, hidden], overwriting it.

        Args:
            hidden: the embeddings, or what the layer before ``first`` returned; contiguous.
            step: this step's tokens.
            k_caches: per layer of this decoder, [N, P, K, D].
            v_caches: likewise.
            first: begin of the range; a caller may act between groups of layers.
            last: its end.

        Returns:
            ``hidden``: the residual stream after the last layer run, not yet normed.

        Raises:
            ValueError: native layers cannot read the caches' layout.
        """
        assert hidden.is_contiguous()
        end = len(self) if last is None else last
        if not self.is_native:
            self._run_torch(hidden, step, k_caches, v_caches, first, end)
        elif self.all_reduce is None:
            self._native.run(hidden, step, k_caches, v_caches, first, end)
        else:
            partial = torch.empty_like(hidden)
            for index in range(first, end):
                for half in (ATTENTION_HALF, MLP_HALF):
                    self._native.run(hidden, step, k_caches, v_caches, index, index + 1, halves=half, partial=partial)
                    self.all_reduce(partial)
                    hidden += partial
        return hidden

    def _run_torch(
        self,
        hidden: Tensor,
        step: StepInputs,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        first: int,
        end: int,
    ) -> None:
        if first == end:
            return
        eps = self.shape.norm_eps
        normed = rms_norm(hidden, self._torch[first].input_norm, eps)
        for index in range(first, end):
            layer = self._torch[index]
            partial = layer.attention(normed, step, k_caches[index], v_caches[index])
            if self.all_reduce is not None:
                self.all_reduce(partial)
            normed = add_rms_norm(partial, hidden, layer.post_attention_norm, eps)
            partial = layer.mlp(normed)
            if self.all_reduce is not None:
                self.all_reduce(partial)
            if index + 1 < end:
                # One pass over the residual stream for the sum and the next layer's norm.
                normed = add_rms_norm(partial, hidden, self._torch[index + 1].input_norm, eps)
            else:
                hidden += partial
