"""What can be known of a model directory without loading its weights: sizes for planning memory, limits for the API.

Light on purpose: it imports transformers' configuration classes, not torch models.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from distserve.core.config import KvConfig, KvLayout
from distserve.core.errors import ConfigError
from distserve.engine.checkpoint import inspect_checkpoint
from distserve.engine.support import check_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Data types the engine computes in, and the bytes of one number."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model's facts.

    ``max_model_len`` is the most tokens (prompt and output) a sequence may have; ``num_parameters`` counts the numbers
    in the checkpoint.
    """

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    num_parameters: int

    def weight_bytes(self, dtype: str) -> int:
        """Memory the weights take once cast to ``dtype``."""
        return self.num_parameters * DTYPE_BYTES[dtype]

    def token_bytes(self, dtype: str) -> int:
        """KV memory of one token over all layers."""
        return self.layout(KvConfig(num_blocks=1), dtype).token_bytes

    def layout(self, kv: KvConfig, dtype: str) -> KvLayout:
        """How a KV pool of this model is laid out in memory."""
        return KvLayout(
            num_layers=self.num_layers,
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
        )


def load_config(model_dir: Path) -> PreTrainedConfig:
    """The model's transformers configuration, checked to be one that can be served exactly.

    Raises:
        ConfigError: no such directory, or no readable config.json in it.
        UnsupportedModelError: the model cannot be served exactly.
    """
    if not model_dir.is_dir():
        raise ConfigError(f"model directory {model_dir} does not exist")
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir} has no config.json: it is not a Hugging Face model directory")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{model_dir / 'config.json'} is not understood by transformers: {error}") from error
    check_config(config)
    return config


def describe(model_dir: str | Path) -> ModelDescription:
    """Describe the model in a Hugging Face directory from its configuration and the headers of its weight files.

    Raises:
        ConfigError: the directory, its configuration or its weights are missing or damaged.
        UnsupportedModelError: the model cannot be served exactly.
    """
    path = Path(model_dir)
    config = load_config(path)
    return describe_config(config, path)


def describe_config(config: PreTrainedConfig, model_dir: Path) -> ModelDescription:
    """As :func:`describe`, for a configuration already read from ``model_dir``."""
    num_heads = config.num_attention_heads
    return ModelDescription(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_parameters=inspect_checkpoint(model_dir).num_parameters,
    )
