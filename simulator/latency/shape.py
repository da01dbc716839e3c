"""The facts of a model that decide how long its steps take and what memory it needs, from its ``config.json``.

Reads JSON only: neither torch nor transformers is needed, so a planner can start fast and know models it cannot run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError, UnsupportedModelError
from simulator.latency.quantisation import weight_bits
from simulator.model import KvGeometry

ONE_RANK = ParallelConfig()
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Architectures whose MLP is up, activation, down; all others have a gate beside up (SwiGLU and its kind).
_UNGATED = frozenset(
    {
        "bloom",
        "codegen",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "mpt",
        "opt",
        "phi",
        "starcoder2",
    }
)
# Architectures that share embedding and output matrix unless their config says otherwise.
_TIED = frozenset(
    {"bloom", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "starcoder2"}
)
# Rows of the learned position table beyond the config's number of positions.
_LEARNED_POSITIONS = {"opt": 2, "gpt2": 0, "gpt_bigcode": 0, "gpt_neo": 0}


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Of a token a layer caches ``kv_rank`` columns, from which the keys and values of all heads are made, and ``rope``
    columns of one rotated key that they share. A head's queries and keys have ``nope + rope`` columns, its values
    ``value``. Queries are made from ``query_rank`` columns, 0: from the hidden state itself.
    """

    query_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int

    @property
    def cached(self) -> int:
        """Columns cached of a token, the same on every shard."""
        return self.kv_rank + self.rope


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer, as far as time and memory depend on it.

    ``num_experts`` 0 is a dense model; else ``num_moe_layers`` of the layers route each token to ``experts_per_token``
    experts of ``expert_intermediate`` columns, beside shared ones of ``shared_intermediate`` columns in all, and only
    the other layers have the dense MLP of ``intermediate`` columns. ``num_positions`` counts rows of a learned position
    table, ``max_model_len`` tokens of its longest sequence by the config (0: unsaid). With ``latent`` attention
    ``num_kv_heads`` is 1, for what is cached, and ``head_dim`` that of queries and keys. ``weight_bits`` are those of a
    quantised weight of the layers, in the mean (0: weights are as wide as activations); tables are not quantised.
    Biases, norms and scales are neglected (below 0.1% of the weights; a scale for 128 weights of 4 bits adds 3%).
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    num_positions: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    num_moe_layers: int = 0
    dtype_bytes: int = 2
    max_model_len: int = 0
    latent: LatentAttention | None = None
    weight_bits: float = 0.0

    @classmethod
    def load(cls, path: str | Path) -> "ModelShape":
        """Read a Hugging Face model directory, or its ``config.json``.

        Raises ConfigError if the file is missing, is no JSON object or lacks a key, UnsupportedModelError if the
        architecture is one whose cost this module would get wrong.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the model's config.json at {file}: {error.strerror or error}. "
                "Give a Hugging Face model directory, or a config.json"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{file} is not a model's config: a JSON object is expected")
        return cls.from_config(config, name=file.parent.name if file.name == "config.json" else file.stem)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, name: str) -> "ModelShape":
        """From the content of a ``config.json``. Raises as :meth:`load` does."""
        # What a multimodal model says of itself as a whole (quantisation, tied embeddings) goes for its decoder.
        config = {**config, **(config.get("text_config") or {})}
        kind = config.get("model_type", "")
        if config.get("is_encoder_decoder"):
            raise UnsupportedModelError(f"{name}: only decoder-only models are modelled")

        def number(*keys: str, default: int | None = None) -> int:
            found = next((config[key] for key in keys if config.get(key) is not None), default)
            if not isinstance(found, int) or isinstance(found, bool) or found < 0:
                raise ConfigError(f"{name}: its config needs a whole number {keys[0]!r}, not {found!r}")
            return found

        hidden = number("hidden_size", "n_embd", "d_model")
        num_heads = number("num_attention_heads", "n_head", "n_heads")
        num_layers = number("num_hidden_layers", "n_layer", "n_layers")
        if min(hidden, num_heads, num_layers) == 0:
            raise ConfigError(f"{name}: its config has no layers, heads or columns")
        multi_query = bool(config.get("multi_query")) and kind in {"falcon", "gpt_bigcode"}
        num_kv_heads = number("num_key_value_heads", "num_kv_heads", default=1 if multi_query else num_heads)
        head_dim = number("head_dim", default=hidden // num_heads)
        latent = None
        if config.get("kv_lora_rank"):
            latent = LatentAttention(
                number("q_lora_rank", default=0),
                number("kv_lora_rank"),
                number("qk_nope_head_dim"),
                number("qk_rope_head_dim"),
                number("v_head_dim"),
            )
            num_kv_heads, head_dim = 1, latent.nope + latent.rope
        experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
        positions = number("max_position_embeddings", "n_positions", default=0)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in _DTYPE_BYTES:
            raise UnsupportedModelError(f"{name}: dtype {dtype!r} is not modelled; known: {', '.join(_DTYPE_BYTES)}")
        intermediate = number("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden)
        expert_intermediate = number("moe_intermediate_size", default=intermediate) if experts else 0
        shared = number("shared_expert_intermediate_size", default=0)
        if experts and not shared:
            shared = number("n_shared_experts", default=0) * expert_intermediate
        return cls(
            name=name,
            num_layers=num_layers,
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=number("vocab_size"),
            gated_mlp=kind not in _UNGATED,
            tied_embeddings=bool(config.get("tie_word_embeddings", kind in _TIED)),
            num_positions=positions + _LEARNED_POSITIONS[kind] if kind in _LEARNED_POSITIONS else 0,
            num_experts=experts,
            experts_per_token=number("num_experts_per_tok", default=0) if experts else 0,
            expert_intermediate=expert_intermediate,
            shared_intermediate=shared if experts else 0,
            num_moe_layers=_num_moe_layers(config, num_layers) if experts else 0,
            dtype_bytes=_DTYPE_BYTES[dtype],
            max_model_len=positions,
            latent=latent,
            weight_bits=weight_bits(config.get("quantization_config"), name),
        )

    @property
    def kv(self) -> KvGeometry:
        """What decides the bytes of its KV cache."""
        columns = 2 * self.head_dim if self.latent is None else self.latent.cached
        return KvGeometry(self.num_layers, self.num_kv_heads, columns * self.dtype_bytes)

    @property
    def weight_item(self) -> float:
        """Bytes of a weight of the layers' matrices."""
        return self.weight_bits / 8 or self.dtype_bytes

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.gated_mlp else 2

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, a shared matrix counted once."""
        tables = self.vocab * self.hidden * (1 if self.tied_embeddings else 2) + self.num_positions * self.hidden
        return tables + sum(self._layer_parameters(tp=1))

    def layers_per_stage(self, parallel: ParallelConfig) -> int:
        """Layers of the fullest pipeline stage."""
        return -(-self.num_layers // parallel.pp)

    def kv_heads_per_rank(self, parallel: ParallelConfig) -> int:
        """KV heads each shard holds; with more shards than heads a head is held more than once."""
        return max(self.num_kv_heads // parallel.tp, 1)

    def weight_bytes(self, parallel: ParallelConfig = ONE_RANK) -> int:
        """Bytes of weights on the fullest rank.

        Layers are split over the stages, matrices (the vocabulary's too) over the shards; the embedding is on the first
        stage, the output matrix on the last, where a model that ties them needs a copy of it.
        """
        self.check(parallel)
        tp = parallel.tp
        attention_and_dense, moe = self._layer_parameters(tp)
        stage = (attention_and_dense + moe) * self.layers_per_stage(parallel) // self.num_layers
        table = -(-self.vocab // tp) * self.hidden
        positions = self.num_positions * self.hidden
        num_tables = 2 if parallel.pp == 1 and not self.tied_embeddings else 1
        tables = num_tables * table + positions
        return int(stage * self.weight_item) + tables * self.dtype_bytes

    def kv_bytes_per_token(self, parallel: ParallelConfig = ONE_RANK) -> int:
        """KV bytes one token takes on the fullest rank."""
        return self.layers_per_stage(parallel) * self.kv_heads_per_rank(parallel) * self.kv.token_bytes

    def check(self, parallel: ParallelConfig) -> None:
        """Raise ConfigError if the model cannot be split so; it says which splits are possible."""
        if parallel.tp < 1 or parallel.pp < 1:
            raise ConfigError(f"tp {parallel.tp} and pp {parallel.pp} must be at least 1")
        if not self._divides(parallel.tp):
            possible = [str(tp) for tp in range(1, 65) if self._divides(tp)]
            raise ConfigError(
                f"{self.name} cannot be split over tp {parallel.tp}: it has {self.num_heads} query heads, "
                f"{self.num_kv_heads} KV heads and an MLP of {self.intermediate} columns. "
                f"Possible: tp {', '.join(possible)}"
            )
        if parallel.pp > self.num_layers:
            raise ConfigError(f"{self.name} has {self.num_layers} layers, too few for pp {parallel.pp} stages")

    def _divides(self, tp: int) -> bool:
        heads = self.num_heads % tp == 0 and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
        columns = {self.intermediate, self.expert_intermediate, self.shared_intermediate}
        return heads and all(number % tp == 0 for number in columns)

    def _layer_parameters(self, tp: int) -> tuple[int, int]:
        """Weights of all layers on one shard: (attention and dense MLPs, routers and experts)."""
        attention = self._attention_parameters(tp)
        dense = self.mlp_matrices * self.hidden * self.intermediate // tp
        experts = self.mlp_matrices * self.hidden * self.expert_intermediate // tp * self.num_experts
        shared = self.mlp_matrices * self.hidden * self.shared_intermediate // tp
        router = self.hidden * self.num_experts
        moe = (experts + shared + router) * self.num_moe_layers
        return attention * self.num_layers + dense * (self.num_layers - self.num_moe_layers), moe

    def _attention_parameters(self, tp: int) -> int:
        heads, latent = self.num_heads // tp, self.latent
        if latent is None:
            return self.hidden * self.head_dim * (2 * heads + 2 * max(self.num_kv_heads // tp, 1))
        narrow = self.hidden * (latent.query_rank + latent.cached)
        queries = (latent.query_rank or self.hidden) * heads * self.head_dim
        keys_and_values = latent.kv_rank * heads * (latent.nope + latent.value)
        return narrow + queries + keys_and_values + heads * latent.value * self.hidden


def _num_moe_layers(config: dict[str, Any], num_layers: int) -> int:
    """Layers with experts: every ``decoder_sparse_step``-th that no other key names as dense."""
    dense = set(config.get("mlp_only_layers") or ()) | set(range(config.get("first_k_dense_replace") or 0))
    step = config.get("decoder_sparse_step") or 1
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
