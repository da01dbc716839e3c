"""Shapes read from config.json: weights of well-known models, possible splits, errors that say what is wrong."""

import json

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError, UnsupportedModelError
from simulator.latency.shape import ModelShape

OPT_13B = {
    "model_type": "opt", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "ffn_dim": 20480,
    "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16", "word_embed_proj_dim": 5120,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_32B = {
    "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "head_dim": 128,
    "num_key_value_heads": 8, "intermediate_size": 25600, "vocab_size": 151936, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
    "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (OPT_13B, 12.853), (LLAMA_8B, 8.030), (QWEN3_32B, 32.762), (GPT2, 0.1244), (MIXTRAL, 46.703),
        (QWEN3_30B_A3B, 30.532),
    ],
    ids=["opt-13b", "llama-3.1-8b", "qwen3-32b", "gpt2", "mixtral-8x7b", "qwen3-30b-a3b"],
)  # fmt: skip
def test_parameters_of_known_models(config, billions):
    shape = ModelShape.from_config(config, name="model")
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert shape.weight_bytes() == shape.num_parameters * 2


def test_a_rank_holds_its_share_of_layers_and_matrices():
    shape = ModelShape.from_config(LLAMA_8B, name="llama")
    table = 128256 * 4096 * 2
    layers = shape.weight_bytes() - 2 * table
    assert shape.weight_bytes(ParallelConfig(tp=4)) == shape.weight_bytes() // 4
    assert shape.weight_bytes(ParallelConfig(pp=4)) == layers // 4 + table
    assert shape.weight_bytes(ParallelConfig(pp=3)) == layers * 11 // 32 + table


def test_a_kv_head_is_held_more_than_once_when_there_are_more_shards():
    shape = ModelShape.from_config(LLAMA_8B, name="llama")
    assert shape.kv_bytes_per_token() == shape.kv.bytes_per_token == 131072
    assert shape.kv_bytes_per_token(ParallelConfig(tp=8)) == 131072 // 8
    assert shape.kv_bytes_per_token(ParallelConfig(tp=16)) == 131072 // 8
    assert shape.kv_bytes_per_token(ParallelConfig(pp=3)) == 131072 * 11 // 32


def test_layers_without_experts_are_dense():
    config = QWEN3_30B_A3B | {"mlp_only_layers": [0, 1], "decoder_sparse_step": 2}
    assert ModelShape.from_config(config, name="moe").num_moe_layers == 23


def test_impossible_splits_name_the_possible_ones():
    shape = ModelShape.from_config(LLAMA_8B, name="llama")
    with pytest.raises(ConfigError, match=r"tp 3: it has 32 query heads.*Possible: tp 1, 2, 4, 8, 16, 32"):
        shape.check(ParallelConfig(tp=3))
    with pytest.raises(ConfigError, match="too few for pp 33"):
        shape.check(ParallelConfig(pp=33))
    with pytest.raises(ConfigError, match="at least 1"):
        shape.check(ParallelConfig(tp=0))


def test_reads_a_directory_or_a_file(tmp_path):
    directory = tmp_path / "my-llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    shape = ModelShape.load(directory)
    assert shape.name == "my-llama"
    assert ModelShape.load(directory / "config.json") == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ('{"hidden_size": 8}', "num_attention_heads")],
)
def test_bad_configs_are_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        ModelShape.load(file)


def test_a_missing_config_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="Give a Hugging Face model directory"):
        ModelShape.load(tmp_path)


DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "vocab_size": 102400, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK_V2_LITE | {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "vocab_size": 129280, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_latent_attention_has_the_published_sizes():
    """15.7 and 671 billion parameters; V3 caches 70,272 bytes a token (DeepSeek-V3, arXiv 2505.09343, table 1)."""
    lite = ModelShape.from_config(DEEPSEEK_V2_LITE, name="lite")
    assert lite.num_parameters == pytest.approx(15.7e9, rel=0.01)
    large = ModelShape.from_config(DEEPSEEK_V3, name="v3")
    assert large.num_parameters == pytest.approx(671e9, rel=0.005)
    assert large.kv_bytes_per_token() == 70_272
    # The cached columns belong to all heads: no shard can do with fewer.
    assert large.kv_bytes_per_token(ParallelConfig(tp=8)) == 70_272
    tables = 2 * 129280 * 7168
    assert large.weight_bytes() == pytest.approx(large.num_parameters + tables, rel=1e-3)
    assert large.weight_bytes(ParallelConfig(tp=8)) == pytest.approx(large.weight_bytes() / 8, rel=0.03)


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "awq", "w_bit": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
    ],
)
def test_quantised_weights_take_their_bits(quantisation, bits):
    shape = ModelShape.from_config(LLAMA_8B | {"quantization_config": quantisation}, name="model")
    plain = ModelShape.from_config(LLAMA_8B, name="model")
    assert shape.weight_bits == bits
    tables = 2 * plain.vocab * plain.hidden * 2
    assert shape.weight_bytes() - tables == pytest.approx((plain.weight_bytes() - tables) * bits / 16)
    assert shape.kv == plain.kv


@pytest.mark.parametrize("extra", [{"quantization_config": {"quant_method": "secret"}}, {"torch_dtype": "int3"}])
def test_what_would_be_priced_wrongly_is_refused(extra):
    with pytest.raises(UnsupportedModelError):
        ModelShape.from_config(LLAMA_8B | extra, name="model")


def test_what_a_multimodal_model_says_as_a_whole_goes_for_its_decoder() -> None:
    quantisation = {"quant_method": "fp8"}
    plain = ModelShape.from_config(LLAMA_8B | {"quantization_config": quantisation}, name="model")
    nested = {"model_type": "mllama", "quantization_config": quantisation, "text_config": LLAMA_8B}
    assert ModelShape.from_config(nested, name="model") == plain
