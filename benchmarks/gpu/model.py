"""The model that the engine is measured with: a Llama of 8B parameters with random weights, made on the card.

Weights on disk would take longer to write than to measure. ``TINY`` rehearses the same on a CPU.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from distserve.core.config import KvLayout
from distserve.core.request import Request, SamplingParams
from distserve.engine.attention import IMPLEMENTATION
from distserve.engine.device.backend import Backend, HostBackend
from distserve.engine.device.cuda import CudaBackend
from distserve.engine.device.runner import DeviceRunner
from distserve.engine.device.start import make_pool, start_runner

BLOCK_SIZE = 16


@dataclass(frozen=True)
class EngineSizes:
    """The model and what is asked of it."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    max_model_len: int = 8192
    context: int = 2048
    """Tokens that each sequence of a decode step has cached, in the mean over its steps."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    wanted_batches: tuple[int, ...] = (1, 16, 64)
    decode_steps: int = 32
    prompt: int = 4096
    num_requests: int = 192
    prompts: tuple[int, int] = (128, 1024)
    """Shortest and longest prompt of the load."""
    num_output: int = 128
    max_batch_tokens: int = 2048
    ceiling_bytes: int = 8 << 30
    ceiling_matrix: int = 8192

    @property
    def config(self) -> LlamaConfig:
        """The model as transformers knows it."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_model_len,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of all layers."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Numbers in the matrix that makes logits."""
        return self.hidden_size * self.vocab_size

    def layout(self, num_tokens: int) -> KvLayout:
        """A KV pool for ``num_tokens`` tokens."""
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        return KvLayout(self.num_layers, num_blocks, BLOCK_SIZE, self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def most_tokens(self) -> int:
        """Tokens of KV that the largest measurement takes."""
        growth = self.decode_steps + 2 * BLOCK_SIZE
        load = self.num_requests * (self.prompts[1] + self.num_output + BLOCK_SIZE)
        return max(max(self.batches) * (self.context + growth), 2 * self.prompt, min(load, 1 << 18))


TINY = EngineSizes(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    max_model_len=256,
    context=48,
    batches=(1, 2, 5),
    wanted_batches=(1, 2),
    decode_steps=4,
    prompt=64,
    num_requests=5,
    prompts=(4, 20),
    num_output=6,
    max_batch_tokens=32,
    ceiling_bytes=1 << 20,
    ceiling_matrix=128,
)


def build(sizes: EngineSizes, device: torch.device) -> PreTrainedModel:
    """The model with random weights on ``device``, as transformers has it."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    factory: Any = AutoModelForCausalLM
    with torch.device(device):
        module: PreTrainedModel = factory.from_config(sizes.config, dtype=dtype, attn_implementation="sdpa")
    module.train(mode=False).requires_grad_(requires_grad=False)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight.normal_(0.0, 0.02)
    return module


def start(module: PreTrainedModel, sizes: EngineSizes, device: torch.device, *, graphs: bool = True) -> DeviceRunner:
    """The engine on ``module``, which it takes apart."""
    backend: Backend = CudaBackend(device) if device.type == "cuda" else HostBackend()
    module.set_attn_implementation(IMPLEMENTATION)
    pool = make_pool(sizes.layout(sizes.most_tokens), None, backend)
    return start_runner(module, pool, backend, max_batch_size=max(sizes.batches), graphs=graphs)


def make_requests(sizes: EngineSizes) -> list[Request]:
    """The load: prompts of random tokens and lengths, all there at once, each answered in full length, greedily."""
    rng = random.Random(0)
    requests = []
    for number in range(sizes.num_requests):
        prompt = random_tokens(rng, rng.randint(*sizes.prompts), sizes.vocab_size)
        sampling = SamplingParams(max_tokens=sizes.num_output, temperature=0.0)
        requests.append(Request(f"r{number:04}", "owner", prompt, sampling, arrival=float(number)))
    return requests


def random_tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    """``count`` tokens."""
    return tuple(rng.randrange(1, vocab_size) for _ in range(count))


def long_request(tokens: Sequence[int], max_tokens: int) -> Request:
    """A request of a measurement's own, answered greedily."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return replace(Request("r", "owner", (), sampling), prompt_token_ids=tuple(tokens))
