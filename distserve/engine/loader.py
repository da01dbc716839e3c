"""From a Hugging Face directory to a loaded module of transformers' own class.

Weights are read from safetensors files (memory-mapped, one tensor at a time) into a module built without storage, so
that memory never holds them twice. Every tensor must find its place: nothing is left at its random initial value.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.engine.attention import IMPLEMENTATION
from distserve.engine.checkpoint import inspect_checkpoint
from distserve.engine.kv import TORCH_DTYPES

_MOST_NAMES = 5


def load_module(config: PreTrainedConfig, model_dir: Path, dtype: str) -> PreTrainedModel:
    """Load the weights in ``model_dir``, cast to ``dtype``, into the class that transformers has for ``config``.

    Raises:
        UnsupportedModelError: transformers has no language model for the configuration, or its attention or state
            cannot be paged.
        ConfigError: the weights are missing, damaged, or do not fit the configuration.
    """
    model_class = model_class_for(config)
    inspect_checkpoint(model_dir)
    return from_weights(model_class, config, dtype, None, model_dir)


def from_weights(
    model_class: Any,
    config: PreTrainedConfig,
    dtype: str,
    weights: dict[str, Any] | None,
    model_dir: Path,
    is_absent: Callable[[str], bool] = lambda _: False,
) -> PreTrainedModel:
    """Fill a ``model_class`` with ``weights``, cast to ``dtype``; None takes the files in ``model_dir``.

    A tensor that has no place in the model is none too many if ``is_absent(name)``.

    Raises:
        ConfigError: the weights are damaged or do not fit the configuration.
    """
    with _quiet_transformers():
        try:
            module, report = model_class.from_pretrained(
                str(model_dir) if weights is None else None,
                config=config,
                state_dict=weights,
                dtype=TORCH_DTYPES[dtype],
                attn_implementation=IMPLEMENTATION,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            TypeError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise ConfigError(f"the weights in {model_dir} cannot be loaded: {error}") from error
    report["unexpected_keys"] = {name for name in report["unexpected_keys"] if not is_absent(name)}
    _check_report(report, model_dir)
    module.eval().requires_grad_(requires_grad=False)
    model: PreTrainedModel = module
    return model


def model_class_for(config: PreTrainedConfig) -> Any:
    """The language model class that transformers has for ``config``.

    Raises:
        UnsupportedModelError: there is none, or its attention or state cannot be paged.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"transformers has no causal language model for {config.model_type}")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(
            f"a {config.model_type} model cannot be served: its state per sequence is not a paged KV cache"
        )
    if not model_class.is_backend_compatible():
        raise UnsupportedModelError(
            f"a {config.model_type} model cannot be served: its attention does not go through transformers' "
            "AttentionInterface, so it cannot be paged"
        )
    return model_class


def _check_report(report: dict[str, Any], model_dir: Path) -> None:
    """Refuse weights that do not fit; ``report`` is transformers' own account of the loading."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ConfigError(
            f"{len(mismatched)} tensors in {model_dir} have the wrong shape for its config.json, for example "
            f"{name}: {list(found)} where {list(expected)} is expected"
        )
    for key, what in (("missing_keys", "lack"), ("unexpected_keys", "have, unknown to this architecture,")):
        names = sorted(report[key])
        if names:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            raise ConfigError(f"the weights in {model_dir} {what} {', '.join(names[:_MOST_NAMES])}{more}")
    if report.get("error_msgs"):
        raise ConfigError(f"the weights in {model_dir} cannot be loaded: {report['error_msgs']}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report on standard error: problems are raised, progress is the caller's to show."""
    logger = logging.getLogger("transformers")
    controls: Any = transformers_logging
    level, bar = logger.level, controls.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    controls.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            controls.enable_progress_bar()
