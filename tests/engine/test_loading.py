"""Model directories that cannot be served are refused with a sentence that says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    T5Config,
)

from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.engine.description import describe
from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import Harness, make_request
from tests.engine.models import CONFIGS, VOCAB, build, save

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_theta": 10000.0}


def load(path: Path) -> Worker:
    return Worker(path, kv=KvConfig(8, 4))


@pytest.fixture
def directory(llama: Served, tmp_path: Path) -> Path:
    """A copy of a good model directory, to be damaged."""
    return Path(shutil.copytree(llama.path, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_description_needs_no_weights_in_memory(llama: Served) -> None:
    description = describe(llama.path)
    assert description.model_type == "llama"
    assert description.vocab_size == VOCAB
    assert description.max_model_len == 512
    model = build(CONFIGS["llama"])
    assert description.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert description.weight_bytes("bfloat16") == 2 * description.num_parameters
    # 3 layers, keys and values, 2 KV heads of 8 numbers of 4 bytes
    assert description.token_bytes("float32") == 3 * 2 * 2 * 8 * 4
    assert description.layout(KvConfig(10, 4), "float32") == llama.worker(num_blocks=10).layout


def test_weights_in_several_files(llama: Served, tmp_path: Path) -> None:
    build(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert describe(tmp_path).num_parameters == describe(llama.path).num_parameters
    track = Harness(load(tmp_path)).generate(make_request(llama.prompts[0]), NUM_TOKENS)
    assert track.output == llama.expected[0]


def test_bfloat16_weights_served_in_float32_and_back(llama: Served, tmp_path: Path) -> None:
    build(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        worker = Worker(tmp_path, dtype=dtype, kv=KvConfig(32, 4))
        assert worker.layout.dtype == dtype
        track = Harness(worker).generate(make_request(llama.prompts[0]), 3)
        assert len(track.output) == 3


def test_uses_the_memory_it_is_given(llama: Served) -> None:
    layout = describe(llama.path).layout(KvConfig(32, 4), "float32")
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    worker = Worker(llama.path, kv=KvConfig(32, 4), kv_buffer=buffer)
    buffer.zero_()
    track = Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS)
    assert track.output == llama.expected[0]
    # Each token but the last, which was never an input, left its KV: of all else nothing was written.
    num_computed = len(llama.prompts[0]) + NUM_TOKENS - 1
    written = buffer.view(torch.float32).view(layout.shape).abs().sum((0, 1, 4, 5)) > 0
    assert int(written.sum()) == num_computed


def test_unknown_dtype(llama: Served) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        Worker(llama.path, dtype="float16", kv=KvConfig(8, 4))


def test_pool_without_room(llama: Served) -> None:
    for kv in (KvConfig(1, 16), KvConfig(2, 4)):
        with pytest.raises(ConfigError, match="too small"):
            Worker(llama.path, kv=kv)
    assert Worker(llama.path, kv=KvConfig(2, 6)).layout.num_blocks == 2


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        describe(tmp_path / "nowhere")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no_such_model"}', "{}", '{"model_type": "llama", "num_hidden_layers": "12"}']
)
def test_config_that_makes_no_sense(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        describe(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for function in (describe, load):
        with pytest.raises(ConfigError, match="has no weights"):
            function(directory)


def test_only_pickled_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        describe(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated_weights(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for function in (describe, load):
        with pytest.raises(ConfigError, match=r"truncated|cut off"):
            function(directory)


def test_damaged_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"!!!!"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        describe(directory)


def test_missing_shard(tmp_path: Path) -> None:
    build(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        describe(tmp_path)


def test_index_without_map(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        describe(directory)


def test_mismatched_shapes(directory: Path) -> None:
    edit_config(directory, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"wrong shape.*mlp.*48.*64"):
        load(directory)


def test_missing_tensor(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


def test_unexpected_tensor(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.ones(2)}))
    with pytest.raises(ConfigError, match=r"unknown to this architecture.*adapter"):
        load(directory)


def test_weights_that_are_no_numbers(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ConfigError, match="not finite"):
        load(directory)


def window_by_the_mask_alone() -> PreTrainedConfig:
    sizes = SMALL | {"max_position_embeddings": 512}
    return PhimoeConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=100)


def window_that_the_mask_has_not() -> PreTrainedConfig:
    config = OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)
    config.sliding_window = 100
    return config


@pytest.mark.parametrize("make", [window_by_the_mask_alone, window_that_the_mask_has_not])
def test_windows_longer_than_a_trial_that_masks_and_layers_do_not_agree_on_are_noticed(
    tmp_path: Path, make: Callable[[], PreTrainedConfig]
) -> None:
    save(make(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="sliding windows that its layers ask for"):
        load(tmp_path)


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "encoder-decoder": (T5Config(vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4), "encoder-decoder"),
    "cross-attention": (GPT2Config(vocab_size=VOCAB, n_embd=32, n_head=4, add_cross_attention=True), "cross-attention"),
    "multimodal": (Gemma3Config(text_config={**SMALL, "head_dim": 8}, vision_config={}), "multimodal"),
    "state": (MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "usual kind|state per sequence"),
    "hybrid": (JambaConfig(**SMALL), "paged KV cache"),
    "chunked attention": (Llama4TextConfig(**SMALL, head_dim=8), "chunked_attention"),
    "quantised": (LlamaConfig(**SMALL, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "dynamic NTK": (LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, **ROPE}), "dynamic"),
    "longrope": (
        Phi3Config(
            **SMALL,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
                **ROPE,
            },
        ),
        "longrope",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_its_configuration(directory: Path, name: str) -> None:
    config, reason = REFUSED[name]
    config.save_pretrained(directory)
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(directory)


def test_attention_outside_the_interface_is_refused(tmp_path: Path) -> None:
    save(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), tmp_path)
    with pytest.raises(UnsupportedModelError, match="cannot be served"):
        load(tmp_path)


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    save(DeepseekV3Config(**SMALL, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, n_routed_experts=4), tmp_path)
    with pytest.raises(UnsupportedModelError, match="keys of shape"):
        load(tmp_path)


def test_encoders_are_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError):
        load(tmp_path)


def test_a_position_bias_that_paging_does_not_know_is_noticed(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that attends differently from what it asks of the attention function is found out by trying it."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def biased(module: torch.nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> object:
        return original(module, query + 0.5, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    with pytest.raises(UnsupportedModelError, match="differ"):
        load(llama.path)
