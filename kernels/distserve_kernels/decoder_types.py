"""What a decoder of the Llama family is made of and what a step of it needs, as plain tensors."""

from dataclasses import dataclass

from torch import Tensor


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
