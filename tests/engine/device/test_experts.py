"""Experts by grouped products are transformers' own experts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from distserve.engine.device.experts import EXPERTS, use_grouped_experts

_SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SMALL, head_dim=16, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24),
    # Transposed weights, biases, a gate of its own.
    "gpt-oss": GptOssConfig(**_SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_compute_what_transformers_does(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    tokens = torch.randint(60, (2, 11))
    with torch.inference_mode():
        expected = model(tokens).logits
        use_grouped_experts(model)
        assert model.config._experts_implementation == EXPERTS
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_experts_is_left_alone(llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    before = model.config._experts_implementation
    use_grouped_experts(model)
    assert model.config._experts_implementation == before
