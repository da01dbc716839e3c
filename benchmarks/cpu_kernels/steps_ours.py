"""Measures steps of a Llama-shape model on this package's kernels; prints one JSON object, {case: seconds}.

Run by run.py, once with the native code and once without (DISTSERVE_NATIVE=0). A step is everything from token ids to
the next tokens: embedding, layers, final norm, vocabulary, argmax, and making the step's inputs.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from distserve_kernels import DecoderLayer, DecoderShape, FusedDecoder, PackedLinear, StepInputs, huge_bytes, rms_norm

BLOCK = 16


class Model:
    """The model of benchmarks/make_model.py with a KV cache of its own."""

    def __init__(self, directory: Path, num_blocks: int) -> None:
        """Loads the directory."""
        config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        self.eps = config["rms_norm_eps"]
        self.shape = DecoderShape(
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            intermediate_size=config["intermediate_size"],
            norm_eps=self.eps,
            scale=config["head_dim"] ** -0.5,
        )
        num_layers = config["num_hidden_layers"]

        def layer(index: int) -> DecoderLayer:
            def take(*names: str) -> Tensor:
                return torch.cat([weights.pop(f"model.layers.{index}.{name}.weight") for name in names])

            return DecoderLayer(
                input_norm=take("input_layernorm"),
                qkv=take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                o_proj=take("self_attn.o_proj"),
                post_attention_norm=take("post_attention_layernorm"),
                gate_up=take("mlp.gate_proj", "mlp.up_proj"),
                down=take("mlp.down_proj"),
            )

        self.decoder = FusedDecoder(self.shape, map(layer, range(num_layers)))
        self.head = PackedLinear(weights.pop("lm_head.weight"), out_dtype=torch.float32)
        self.embedding, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.frequencies = 10000.0 ** -(torch.arange(0, self.shape.head_dim, 2).float() / self.shape.head_dim)
        size = (num_blocks, BLOCK, self.shape.num_kv_heads, self.shape.head_dim)
        self.k_caches, self.v_caches = (
            [huge_bytes(2 * math.prod(size)).view(torch.bfloat16).view(size) for _ in range(num_layers)]
            for _ in range(2)
        )
        self.vocabulary = config["vocab_size"]
        self.num_blocks = num_blocks

    def step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, starts: Tensor, lens: Tensor
    ) -> Tensor:
        """The next token of every sequence."""
        angles = positions[:, None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        inputs = StepInputs(
            cos=angles.cos(),
            sin=angles.sin(),
            slots=slots,
            block_tables=tables,
            query_starts=starts,
            context_lens=lens,
        )
        hidden = self.decoder(self.embedding[tokens], inputs, self.k_caches, self.v_caches)
        last = hidden[(starts[1:] - 1).long()]
        logits: torch.Tensor = self.head(rms_norm(last, self.norm, self.eps))
        return logits.argmax(dim=-1)

    def batch(self, contexts: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Arguments of `step` for sequences of (tokens before, tokens of this step)."""
        positions = torch.cat([torch.arange(before, before + new) for before, new in contexts])
        owners = torch.cat([torch.full((new,), b) for b, (_, new) in enumerate(contexts)])
        per_sequence = max(-(-(before + new) // BLOCK) for before, new in contexts)
        tables = torch.randperm(self.num_blocks)[: per_sequence * len(contexts)].view(len(contexts), -1).int()
        slots = tables[owners, positions // BLOCK].long() * BLOCK + positions % BLOCK
        starts = torch.tensor([0, *torch.tensor([new for _, new in contexts]).cumsum(0).tolist()]).int()
        lens = torch.tensor([before + new for before, new in contexts]).int()
        return torch.randint(self.vocabulary, positions.shape), positions, slots, tables, starts, lens


def measure(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, of processor time on one thread: other processes then count less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def main() -> None:
    """Measures the cases of the command line: model directory, decode batches, context, prompt lengths, threads."""
    directory, batches, context, prompts, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = Model(Path(directory), 2048)
    results = {}
    for size in map(int, batches.split(",")):
        arguments = model.batch([(int(context) - 1, 1)] * size)
        results[f"decode {size}"] = measure(partial(model.step, *arguments), 15)
    for length in map(int, prompts.split(",")):
        arguments = model.batch([(0, length)])
        results[f"prefill {length}"] = measure(partial(model.step, *arguments), 5)
    read = torch.ones(50_000_000)
    results["read 176 MB"] = measure(read.sum, 10) * 176.2 / 200
    print(json.dumps(results))


if __name__ == "__main__":
    main()
