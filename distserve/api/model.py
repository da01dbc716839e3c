"""The model as the HTTP side knows it: names, limits, tokenizer and the sampling defaults its makers recommend."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distserve.api.tokenizer import TextTokenizer, load_tokenizer
from distserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: ``generation_config.json``'s recommendations, as vLLM applies them.

    ``max_tokens`` (its ``max_new_tokens``) limits chat answers of requests that set no limit themselves.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model under ``names``, the first of which is its canonical one.

    ``max_model_len`` tokens of prompt and output together; token ids are below ``vocab_size``. Without a tokenizer only
    token-id prompts can be served.
    """

    names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: TextTokenizer | None = None
    defaults: SamplingDefaults = SamplingDefaults()
    created: int = field(default_factory=lambda: int(time.time()))


def load_served_model(directory: Path, *, names: tuple[str, ...] = (), max_model_len: int | None = None) -> ServedModel:
    """Read a Hugging Face model directory (configuration and tokenizer, no weights).

    The directory's name serves as model name if ``names`` is empty; ``max_model_len`` defaults to the longest context
    the configuration gives. Raises ConfigError when a file is missing or unusable.
    """
    config = _read_object(directory / "config.json", required=True)
    text_config = config.get("text_config", config)
    generation = _read_object(directory / "generation_config.json", required=False)
    tokenizer = load_tokenizer(directory)
    context = max_model_len or text_config.get("max_position_embeddings") or text_config.get("n_positions")
    vocab_size = text_config.get("vocab_size")
    if not isinstance(context, int) or not isinstance(vocab_size, int):
        raise ConfigError(f"{directory / 'config.json'} lacks max_position_embeddings or vocab_size")
    said = generation.get("eos_token_id")
    eos = _token_ids(text_config.get("eos_token_id") if said is None else said)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (*eos, tokenizer.eos_token_id)
    return ServedModel(
        names=names or (directory.resolve().name,),
        max_model_len=context,
        vocab_size=vocab_size,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        tokenizer=tokenizer,
        defaults=_sampling_defaults(generation),
    )


def _read_object(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if required:
            raise ConfigError(f"{path} does not exist: not a Hugging Face model directory") from error
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return loaded


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    given = {
        "temperature": generation.get("temperature"),
        "top_p": generation.get("top_p"),
        "top_k": generation.get("top_k"),
        "min_p": generation.get("min_p"),
        "repetition_penalty": generation.get("repetition_penalty"),
        "max_tokens": generation.get("max_new_tokens"),
    }
    return SamplingDefaults(**{name: value for name, value in given.items() if value is not None})
