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


@pytest.mark.parametrize(
    "extra", [{"kv_lora_rank": 512}, {"quantization_config": {"bits": 4}}, {"torch_dtype": "int3"}]
)
def test_what_would_be_priced_wrongly_is_refused(extra):
    with pytest.raises(UnsupportedModelError):
        ModelShape.from_config(LLAMA_8B | extra, name="model")
