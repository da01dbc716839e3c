"""Tiny random-weight models of every kind the engine serves, written as Hugging Face directories."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 160

# No end token: generation runs to its length, so every token of it can be compared.
_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **_TOKENS,
}


def _rope(rope_type: str, **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **more}}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "llama-llama3": LlamaConfig(
        **_SMALL,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-linear": LlamaConfig(**_SMALL, **_rope("linear", factor=4.0)),
    "llama-yarn": LlamaConfig(**_SMALL, **_rope("yarn", factor=16.0, original_max_position_embeddings=32)),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**_SMALL, head_dim=16),
    "llama-biases": LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "mistral-sliding": MistralConfig(**_SMALL, sliding_window=12),
    "qwen2": Qwen2Config(**_SMALL),
    "qwen2-sliding": Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=10, max_window_layers=1),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "phi3": Phi3Config(**_SMALL, sliding_window=14),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=24,
        **_TOKENS,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=512, **_TOKENS),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        **_TOKENS,
    ),
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe": Qwen3MoeConfig(
        **_SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "gemma2": Gemma2Config(
        **_SMALL, head_dim=16, sliding_window=12, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=12, sliding_window_pattern=2),
}


def build(config: PreTrainedConfig, seed: int = 0, scale: float = 0.35) -> PreTrainedModel:
    """A model whose weights are large enough for its text to vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Where embeddings are tied, large ones would make every token predict itself.
                parameter.normal_(0.0, 0.03 if "embed" in name or "wte" in name else scale)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(config: PreTrainedConfig, path: Path, seed: int = 0, scale: float = 0.35) -> Path:
    """Write a model directory (without a tokenizer)."""
    build(config, seed, scale).save_pretrained(path)
    return path
