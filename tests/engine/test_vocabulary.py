"""The shards' parts of the embeddings and of the head are together what the whole model has."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distserve.core.config import ParallelConfig
from distserve.engine.sharding.shard import Shard
from distserve.engine.sharding.vocabulary import VocabularySplit
from tests.engine.models import CONFIGS, build

TOKENS = torch.tensor([[3, 159, 0, 80, 79, 41]])


class Listener:
    """Stands for the group: keeps what a shard brings to a sum or to a gathering, and hands it back."""

    def __init__(self) -> None:
        self.summed: list[Tensor] = []
        self.gathered: list[Tensor] = []

    def sum(self, tensor: Tensor) -> Tensor:
        self.summed.append(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        self.gathered.append(tensor)
        return tensor


def shard_of(module: Any, tp: int, rank: int) -> Shard:
    config = module.config
    return Shard(ParallelConfig(tp, 1), rank, config.num_hidden_layers, 4, 4, 8)


def split(module: Any, tp: int, rank: int, stored: list[str]) -> tuple[Any, VocabularySplit, Listener]:
    """A copy of ``module`` with the rows of one shard."""
    part, listener = copy.deepcopy(module), Listener()
    vocabulary = VocabularySplit(part, shard_of(module, tp, rank), listener, stored)  # type: ignore[arg-type]
    weights = dict(module.named_parameters())
    for name in {*stored, *weights}:
        slicing, whole = vocabulary.of_checkpoint(name), weights.get(name)
        if slicing is not None and whole is not None:
            (rows,) = slicing.spans
            part.get_parameter(name).data = whole.data[rows[0] : rows[1]]
    part.tie_weights()
    return part, vocabulary, listener


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "gemma2", "gemma3", "gpt-neox", "phi3"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_parts_are_the_whole(name: str, tp: int) -> None:
    module = build(CONFIGS[name])
    stored = [key for key, _ in module.named_parameters()]
    expected = module.get_input_embeddings()(TOKENS)
    hidden = torch.randn(5, module.get_output_embeddings().in_features)
    logits = module.get_output_embeddings()(hidden)
    looked_up, computed = torch.zeros_like(expected), []
    for rank in range(tp):
        part, _, listener = split(module, tp, rank, stored)
        assert part.get_input_embeddings().weight.shape[0] == module.config.vocab_size // tp
        part.get_input_embeddings()(TOKENS)
        part.get_output_embeddings()(hidden)
        looked_up += listener.summed[0]
        computed += listener.gathered
    assert torch.equal(looked_up, expected)
    torch.testing.assert_close(torch.cat(computed, dim=-1), logits)


def test_checkpoints_may_leave_out_the_models_prefix() -> None:
    module = build(CONFIGS["gpt2"])
    _, vocabulary, _ = split(module, 2, 1, ["wte.weight"])
    slicing = vocabulary.of_checkpoint("wte.weight")
    assert slicing is not None
    assert slicing.spans == ((80, 160),)
    assert vocabulary.of_checkpoint("wpe.weight") is None


@pytest.mark.parametrize(("tp", "stored"), [(3, ["model.embed_tokens.weight"]), (2, ["elsewhere.weight"])])
def test_what_cannot_be_split_stays_whole(tp: int, stored: list[str]) -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(CONFIGS["llama-tied"])
    part = copy.deepcopy(module)
    vocabulary = VocabularySplit(part, shard_of(module, tp, 0), Listener(), stored)  # type: ignore[arg-type]
    assert part.get_input_embeddings().weight.shape == module.get_input_embeddings().weight.shape
    assert vocabulary.of_checkpoint("model.embed_tokens.weight") is None
    assert vocabulary.of_checkpoint("lm_head.weight") is None
