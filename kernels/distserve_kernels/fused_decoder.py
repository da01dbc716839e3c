"""A range of Llama-style decoder layers as one call.

Covers the dense, pre-norm family: RMS norms, rotary positions on the halves, grouped-query attention, SiLU-gated MLP;
optional biases and per-head query and key norms (Llama, Mistral, Qwen2, Qwen3 and their likes). It takes plain
tensors and knows nothing of checkpoints, schedulers or how its layers were cut out of a model.

Under tensor parallelism each rank builds it from its shard (its heads, its slice of the MLP) and passes an
``all_reduce`` that sums the two partial results of every layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from distserve_kernels.linear import PackedLinear
from distserve_kernels.ops import add_rms_norm, paged_attention, rms_norm, rope_and_write_kv, silu_mul


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes shared by all layers; heads and ``intermediate_size`` are this rank's own."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    scale: float
    """Factor on the attention's dot products, usually head_dim ** -0.5."""
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer's weights, as [out, in] matrices; the decoder copies what it needs in another layout."""

    input_norm: Tensor
    """[hidden]"""
    qkv: Tensor
    """[(H + 2 K) * D, hidden], q's rows, then k's, then v's"""
    o_proj: Tensor
    """[hidden, H * D]"""
    post_attention_norm: Tensor
    """[hidden]"""
    gate_up: Tensor
    """[2 * I, hidden], gate's rows, then up's"""
    down: Tensor
    """[hidden, I]"""
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a step's tokens are and where their keys and values live; the same for every layer."""

    cos: Tensor
    """[T, R] float32"""
    sin: Tensor
    """[T, R] float32"""
    slots: Tensor
    """[T] int64"""
    block_tables: Tensor
    """[B, max blocks] int32"""
    query_starts: Tensor
    """[B + 1] int32"""
    context_lens: Tensor
    """[B] int32"""


class _TorchLayer:
    """A layer composed of this package's functions."""

    def __init__(self, shape: DecoderShape, layer: DecoderLayer) -> None:
        self.shape = shape
        self.input_norm = layer.input_norm
        self.post_attention_norm = layer.post_attention_norm
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        self.sliding_window = layer.sliding_window
        self.qkv = PackedLinear(layer.qkv, layer.qkv_bias)
        self.o_proj = PackedLinear(layer.o_proj, layer.o_bias)
        self.gate_up = PackedLinear(layer.gate_up)
        self.down = PackedLinear(layer.down)

    def attention(self, normed: Tensor, step: StepInputs, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        shape = self.shape
        q = rope_and_write_kv(
            self.qkv(normed),
            step.cos,
            step.sin,
            k_cache,
            v_cache,
            step.slots,
            shape.num_heads,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=shape.norm_eps,
        )
        attended = paged_attention(
            q,
            k_cache,
            v_cache,
            step.block_tables,
            step.query_starts,
            step.context_lens,
            scale=shape.scale,
            sliding_window=self.sliding_window,
            softcap=shape.softcap,
        )
        return self.o_proj(attended.flatten(1))

    def mlp(self, normed: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(normed)))


class FusedDecoder:
    """Decoder layers ready to run; each iterated layer is packed and may be freed before the next is made."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        *,
        all_reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Packs the layers; ``all_reduce`` sums a tensor over the ranks in place (None: one rank)."""
        self.shape = shape
        self.all_reduce = all_reduce
        self.layers = [_TorchLayer(shape, layer) for layer in layers]

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
            hidden: the embeddings, or what the layer before ``first`` returned.
            step: this step's tokens.
            k_caches, v_caches: per layer of this decoder, [N, P, K, D].
            first, last: the range, so that a caller can act between groups of layers.

        Returns:
            ``hidden``: the residual stream after the last layer run, not yet normed.
        """
        eps = self.shape.norm_eps
        for index in range(first, len(self.layers) if last is None else last):
            layer = self.layers[index]
            partial = layer.attention(
                rms_norm(hidden, layer.input_norm, eps), step, k_caches[index], v_caches[index]
            )
            if self.all_reduce is not None:
                self.all_reduce(partial)
            normed = add_rms_norm(partial, hidden, layer.post_attention_norm, eps)
            partial = layer.mlp(normed)
            if self.all_reduce is not None:
                self.all_reduce(partial)
            hidden += partial
        return hidden

    def __len__(self) -> int:
        return len(self.layers)
