"""Writes a Hugging Face model directory of the Llama architecture with random weights, for measurements.

    python benchmarks/make_model.py /path/to/model            # 88M parameters, the size that the benchmarks use

The weights are seeded: the same options give the same bytes. Initialised like a trained model's (norms of one, small
matrices), so that activations stay in range in bfloat16. The tokenizer has one token per id, spelled ``<id>``, enough
for servers that insist on one.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write; created if missing")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--intermediate-size", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--context", type=int, default=4096, help="max_position_embeddings")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_config(options: argparse.Namespace) -> dict[str, object]:
    """config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "intermediate_size": options.intermediate_size,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": options.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": options.dtype,
    }


def make_weights(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All tensors under the names that Hugging Face's Llama gives them."""
    generator = torch.Generator().manual_seed(options.seed)
    dtype = DTYPES[options.dtype]
    hidden, q_size = options.hidden_size, options.heads * options.head_dim
    kv_size = options.kv_heads * options.head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weights: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return weights.to(dtype)

    weights = {
        "model.embed_tokens.weight": matrix(options.vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": matrix(options.vocabulary, hidden),
    }
    for layer in range(options.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            prefix + "self_attn.q_proj.weight": matrix(q_size, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv_size, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv_size, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, q_size),
            prefix + "mlp.gate_proj.weight": matrix(options.intermediate_size, hidden),
            prefix + "mlp.up_proj.weight": matrix(options.intermediate_size, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, options.intermediate_size),
        }
    return weights


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """A tokenizer whose token i is the word ``<i>``."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def main() -> None:
    """Writes the directory."""
    options = parse_arguments()
    options.directory.mkdir(parents=True, exist_ok=True)
    weights = make_weights(options)
    save_file(weights, options.directory / "model.safetensors", metadata={"format": "pt"})
    (options.directory / "config.json").write_text(json.dumps(make_config(options), indent=2) + "\n")
    make_tokenizer(options.vocabulary).save(str(options.directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<0>",
        "eos_token": "<1>",
        "model_max_length": options.context,
    }
    (options.directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    num_parameters = sum(weight.numel() for weight in weights.values())
    print(f"{options.directory}: {num_parameters / 1e6:.1f}M parameters, {options.dtype}")


if __name__ == "__main__":
    main()
