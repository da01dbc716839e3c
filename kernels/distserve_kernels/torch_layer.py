"""One decoder layer of the Llama family, composed of this package's functions."""

from torch import Tensor

from distserve_kernels.decoder_types import DecoderLayer, DecoderShape, StepInputs
from distserve_kernels.linear import PackedLinear
from distserve_kernels.ops import paged_attention, rope_and_write_kv, silu_mul


class TorchLayer:
    """A decoder layer composed of this package's functions: any device, any data type, any head size."""

    def __init__(self, shape: DecoderShape, layer: DecoderLayer) -> None:
        """Packs the layer's matrices."""
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
        """The attention's contribution to the residual stream, [T, hidden]; writes the caches."""
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
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected

    def mlp(self, normed: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream, [T, hidden]."""
        projected: Tensor = self.down(silu_mul(self.gate_up(normed)))
        return projected
