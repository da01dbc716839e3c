"""Which slices of a model's weights each shard has: together all of them, none twice but for replicated KV heads."""

from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Olmo2Config, PreTrainedModel

from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.engine.description import ModelDescription
from distserve.engine.group.memory import require
from distserve.engine.sharding.cut import find_layers
from distserve.engine.sharding.plan import layer_plan
from distserve.engine.sharding.shard import Shard, shard_of
from distserve.engine.sharding.slicing import LayerSlicing, LazySlice, Slicing
from tests.engine.models import CONFIGS

KV_NAMES = {"k_proj", "v_proj"}
MODELS = ["llama", "llama-biases", "qwen3", "opt", "gpt2", "gpt-neox", "phi3", "mixtral", "qwen3-moe", "gemma3"]


def build_empty(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name])


def shards(model: PreTrainedModel, tp: int) -> list[Shard]:
    config = model.config
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    parallel = ParallelConfig(tp, 1)
    return [Shard(parallel, rank, config.num_hidden_layers, num_heads, num_kv_heads, head_dim) for rank in range(tp)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [2, 4])
def test_the_shards_have_every_row_once_and_replicated_heads_equally_often(name: str, tp: int) -> None:
    model = build_empty(name)
    layer = find_layers(model, model.config.num_hidden_layers)[1][1]
    parameters = dict(layer.named_parameters())
    all_shards = shards(model, tp)
    slicings = [LayerSlicing(layer, layer_plan(model), shard).parameters for shard in all_shards]
    split = set(slicings[0])
    # What is left whole is small: norms, biases added once, and the choice of experts.
    assert all(parameters[n].dim() == 1 or "gate." in n or "router" in n for n in set(parameters) - split)
    copies = max(1, tp // all_shards[0].num_kv_heads)
    for parameter in split:
        assert len({slicing[parameter].dim for slicing in slicings}) == 1
        held = Counter(
            row for slicing in slicings for start, stop in slicing[parameter].spans for row in range(start, stop)
        )
        assert set(held) == set(range(parameters[parameter].shape[slicings[0][parameter].dim]))
        names = set(parameter.split("."))
        if names & KV_NAMES:
            assert set(held.values()) == {copies}
        elif not names & {"qkv_proj", "c_attn"}:
            assert set(held.values()) == {1}


def test_a_lazy_slice_reads_its_rows(tmp_path: object) -> None:
    whole = torch.arange(48.0).view(6, 8)
    save_file({"w": whole}, f"{tmp_path}/w.safetensors")
    with safe_open(f"{tmp_path}/w.safetensors", "pt") as file:
        rows = LazySlice(file.get_slice("w"), Slicing(0, ((1, 2), (4, 6))))[...]
        columns = LazySlice(file.get_slice("w"), Slicing(1, ((2, 5),)))[...]
        assert torch.equal(LazySlice(file.get_slice("w"), None)[...], whole)
    assert torch.equal(rows, whole[[1, 4, 5]])
    assert torch.equal(columns, whole[:, 2:5])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Olmo2Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48), "tp 1 only"),
        (GptOssConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2), "tp 1 only"),
    ],
)
def test_a_plan_that_the_kv_cache_cannot_follow_is_refused(config: object, message: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = find_layers(model, model.config.num_hidden_layers)[1][0]
    with pytest.raises(UnsupportedModelError, match=message):
        LayerSlicing(layer, layer_plan(model), shards(model, 2)[1])


def test_a_width_that_tp_does_not_divide() -> None:
    model = build_empty("llama")
    layer = find_layers(model, 3)[1][0]
    layer.mlp.gate_proj = torch.nn.Linear(32, 50, device="meta")
    with pytest.raises(ConfigError, match=r"tp 4 does not divide the 50 rows of the model's mlp\.gate_proj"):
        LayerSlicing(layer, layer_plan(model), shards(model, 4)[0])


def test_each_rank_keeps_kv_of_its_own_layers_and_heads() -> None:
    model = ModelDescription("llama", 7, 2, 64, 160, 512, 1)
    ranks = [shard_of(model, 8, ParallelConfig(4, 2), rank) for rank in range(8)]
    assert [list(rank.kv_heads) for rank in ranks] == 2 * [[0], [0], [1], [1]]
    layouts = [rank.layout(KvConfig(10, 16), "float32") for rank in ranks]
    assert [layout.num_layers for layout in layouts] == [4, 4, 4, 4, 3, 3, 3, 3]
    assert {layout.num_kv_heads for layout in layouts} == {1}
    assert [rank.rank for rank in ranks if rank.samples] == [4]


def test_too_little_memory_says_how_much_is_missing() -> None:
    require(3 * 2**30, 2**30, 4 * 2**30, "rank 0")
    with pytest.raises(ConfigError, match=r"rank 0 needs 3\.0 GiB for weights .* 1\.5 GiB are missing"):
        require(3 * 2**30, 2**30, 5 * 2**29, "rank 0")
