"""Dense decoders of the Llama family on the fused kernels: the same numbers with far fewer, larger operations.

The weights come out of transformers' loaded module, layer by layer, and each layer of it is dropped as it is packed.
The rotary tables and every layer's attention settings are the module's own, so no formula is written down twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from distserve.engine.inputs import StepInputs
from distserve.engine.kv import KvPool
from distserve.engine.verify import AttentionSettings
from distserve_kernels import DecoderLayer, DecoderShape, FusedDecoder, PackedLinear, rms_norm
from distserve_kernels import StepInputs as LayerInputs

_CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_LAYERS_PER_GROUP = 2
"""Layers run between two announcements of finished KV, where there is KV enough for a transfer to overlap with."""
_NATIVE_BLOCK = 16
_FIRST_POSITIONS = 2048


class FusedModel:
    """Implements :class:`distserve.engine.model.LanguageModel`; takes ``module`` apart."""

    def __init__(self, module: PreTrainedModel, kv: KvPool, settings: Sequence[AttentionSettings]) -> None:
        """``settings[l]`` is how layer l calls attention; :func:`can_fuse` must have said yes."""
        source: Any = module
        config, inner = source.config, source.model
        self.kv = kv
        self.head = PackedLinear(source.lm_head.weight.detach(), out_dtype=torch.float32)
        self.embedding: Tensor = inner.embed_tokens.weight.detach()
        self.norm: Tensor = inner.norm.weight.detach()
        if self.head.is_packed:
            # Then nothing else needs the mapped file that the weights were packed from: let go of it.
            self.embedding, self.norm = self.embedding.clone(), self.norm.clone()
        self.eps: float = config.rms_norm_eps
        shape = DecoderShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=kv.layout.num_kv_heads,
            head_dim=kv.layout.head_dim,
            intermediate_size=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            scale=settings[0].scale,
        )
        self.decoder = FusedDecoder(shape, _take_layers(inner.layers, settings))
        self.rotary: nn.Module = inner.rotary_emb
        self._is_on_cpu = self.embedding.device.type == "cpu"
        self._cos = self._sin = torch.empty(0, device=self.embedding.device)
        if self._is_on_cpu:
            self._extend_rotary(_FIRST_POSITIONS)

    def __call__(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> Tensor:
        """See :class:`distserve.engine.model.LanguageModel`."""
        cos, sin = self._rotate(inputs)
        step = LayerInputs(
            cos=cos,
            sin=sin,
            slots=inputs.slots,
            block_tables=inputs.block_tables,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
        )
        hidden = self.embedding[inputs.tokens]
        num_layers = len(self.decoder)
        is_decode = len(inputs.tokens) == len(inputs.context_lens)
        group = num_layers if on_layer is None or is_decode else _LAYERS_PER_GROUP
        for first in range(0, num_layers, group):
            last = min(first + group, num_layers)
            hidden = self.decoder(hidden, step, self.kv.keys, self.kv.values, first=first, last=last)
            if on_layer is not None:
                for layer in range(first, last):
                    on_layer(layer)
        if not self._are_all(inputs.logits_rows, len(hidden)):
            hidden = hidden[inputs.logits_rows]
        logits: Tensor = self.head(rms_norm(hidden, self.norm, self.eps))
        return logits

    def _are_all(self, rows: Tensor, num_tokens: int) -> bool:
        """Whether logits are wanted of every token, in order; where finding out would mean to wait, they are not."""
        return self._is_on_cpu and len(rows) == num_tokens and torch.equal(rows, torch.arange(num_tokens))

    def _rotate(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Cos and sin [T, R] float32 of the tokens' positions."""
        if not self._is_on_cpu:
            # Two small kernels; how long a table would have to be is not known without waiting for the device.
            cos, sin = self.rotary(self._cos, inputs.positions.unsqueeze(0))
            return cos[0], sin[0]
        needed = int(inputs.context_lens.max())
        if needed > len(self._cos):
            self._extend_rotary(max(needed, 2 * len(self._cos)))
        return self._cos[inputs.positions], self._sin[inputs.positions]

    def _extend_rotary(self, num_positions: int) -> None:
        """Tabulate cos and sin [positions, R] float32."""
        positions = torch.arange(num_positions).unsqueeze(0)
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32), positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()


def can_fuse(module: PreTrainedModel, kv: KvPool, settings: Sequence[AttentionSettings]) -> bool:
    """Whether :class:`FusedModel` computes what ``module`` does."""
    config: Any = module.config
    return (
        type(module) in _CLASSES
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and len({setting.scale for setting in settings}) == 1
        and all(setting.softcap is None and not setting.has_sinks for setting in settings)
        # Native layers, the CPU's in bfloat16, read blocks of whole tiles only; smaller blocks are for tests.
        and (kv.layout.dtype != "bfloat16" or kv.blocks.is_cuda or kv.layout.block_size % _NATIVE_BLOCK == 0)
    )


def _take_layers(layers: nn.ModuleList, settings: Sequence[AttentionSettings]) -> Iterator[DecoderLayer]:
    """The layers' weights; each layer leaves the list as it is handed out."""
    for index, setting in enumerate(settings):
        layer: Any = layers[index]
        layers[index] = nn.Identity()
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        has_bias = projections[0].bias is not None
        yield DecoderLayer(
            input_norm=layer.input_layernorm.weight.detach(),
            qkv=torch.cat([projection.weight.detach() for projection in projections]),
            qkv_bias=torch.cat([projection.bias.detach() for projection in projections]) if has_bias else None,
            q_norm=_weight(getattr(attention, "q_norm", None)),
            k_norm=_weight(getattr(attention, "k_norm", None)),
            o_proj=attention.o_proj.weight.detach(),
            o_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
            post_attention_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]),
            down=mlp.down_proj.weight.detach(),
            sliding_window=setting.sliding_window,
        )


def _weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight.detach()
