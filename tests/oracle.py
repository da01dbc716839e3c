"""What the models say in transformers' own hands: the truth that every path of ours is held against."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from distserve.demo import model_dir


def generate(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Its greedy tokens."""
    settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@cache
def demo_model() -> Any:
    """The demo model in float32; no token ends its texts."""
    model = AutoModelForCausalLM.from_pretrained(str(model_dir()), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model
