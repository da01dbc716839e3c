"""What a model takes of a card, by its configuration; a machine without one says so in a sentence."""

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from distserve.cluster.gpu_probe import model_memory, probe_gpu, visible_as
from distserve.core.errors import ConfigError
from distserve.demo import model_dir

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)


def test_sizes_are_those_of_the_tensors_of_a_step():
    model = model_memory(LLAMA_8B, "bfloat16", weights=1, token_kv=2)
    assert (model.dtype, model.weights, model.token_kv) == ("bfloat16", 1, 2)
    # Residuals and norms 6 x 4096, queries and outputs 2 x 32 x 128, keys and values 2 x 8 x 128, MLP 3 x 14336.
    assert model.token_activations == 2 * (6 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    assert model.row_logits == 128256 * 6
    halved = model_memory(LLAMA_8B, "float32", weights=2, token_kv=4).halved()
    assert halved.token_activations == model.token_activations


@pytest.mark.parametrize(
    ("config", "middle"),
    [
        (GPT2Config(n_embd=64, n_head=4), 4 * 64),
        (
            Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=24, num_experts_per_tok=3, num_attention_heads=4),
            3 * 24,
        ),
    ],
)
def test_families_name_their_sizes_differently(config, middle):
    sizes = model_memory(config, "float32", weights=1, token_kv=1).token_activations // 4
    assert (sizes - 6 * 64 - 3 * middle) % 2 == 0
    assert sizes > 6 * 64 + 3 * middle


def test_instances_see_the_gpu_that_was_examined():
    assert visible_as(1, {}) == "1"
    assert visible_as(1, {"CUDA_VISIBLE_DEVICES": "4, GPU-5f"}) == "GPU-5f"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"^(GPU 0 needs a torch built for CUDA|no GPU 0: torch finds)") as caught:
        probe_gpu(model_dir(), "float32", 0)
    assert "\n" not in str(caught.value)
