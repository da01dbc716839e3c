"""Which models can be served exactly, decided from their configuration.

"Exactly" means that a token's hidden state depends on the tokens before it in its own sequence and on nothing else:
not on how the prompt was cut into chunks, nor on what else is in the batch. What a configuration cannot tell is
found by :mod:`distserve.engine.verify` once the model is loaded.
"""

from collections.abc import Iterator, Mapping

from transformers import PreTrainedConfig

from distserve.core.errors import UnsupportedModelError

_EXACT_LAYER_TYPES = {"full_attention", "sliding_attention"}
_BATCH_DEPENDENT_ROPE = {
    "dynamic": "dynamic NTK scaling recomputes the rotary frequencies of all positions as the text grows",
    "longrope": "longrope changes the rotary frequencies of all positions once the text passes a threshold",
}


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a model that its configuration shows cannot be served exactly.

    Raises:
        UnsupportedModelError: with the reason in one sentence.
    """
    if getattr(config, "is_encoder_decoder", False):
        _refuse(config, "it is an encoder-decoder; only decoder-only language models are served")
    if config.get_text_config() is not config:
        _refuse(config, "it is a multimodal model; only text models are served")
    if quantisation := getattr(config, "quantization_config", None):
        method = quantisation.get("quant_method", "") if isinstance(quantisation, Mapping) else ""
        _refuse(
            config, f"its weights are quantised{f' ({method})' if method else ''}: only unquantised ones are served"
        )
    if getattr(config, "is_heterogeneous", False):
        _refuse(config, "its layers differ in shape from each other")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(config, name, None), int):
            _refuse(config, f"its configuration has no {name}, so it is not a decoder of the usual kind")
    other_layers = set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYER_TYPES
    if other_layers:
        _refuse(config, f"it has layers of type {', '.join(sorted(other_layers))}, whose state is not a paged KV cache")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        _refuse(config, "its attention is not causal")
    if getattr(config, "add_cross_attention", False):
        _refuse(config, "it has cross-attention; only decoder-only language models are served")
    for rope_type in _rope_types(config):
        if rope_type in _BATCH_DEPENDENT_ROPE:
            _refuse(
                config,
                f"{_BATCH_DEPENDENT_ROPE[rope_type]} (rope_type {rope_type!r}), so keys already cached would be wrong",
            )


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    """Rotary variants in use: one, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    per_layer_type = [value for value in parameters.values() if isinstance(value, Mapping)]
    for entry in per_layer_type or [parameters]:
        yield str(entry.get("rope_type", "default"))


def _refuse(config: PreTrainedConfig, reason: str) -> None:
    raise UnsupportedModelError(f"a {config.model_type} model cannot be served: {reason}")
