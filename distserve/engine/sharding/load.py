"""Loads one rank's part of a model: transformers' own class and loading, fed with slices of the files.

Every slice is read when transformers places it, so that memory never holds more than the rank's weights and the tensor
in hand. transformers' conversions (experts stored one by one, renamed modules) work on the slices as on the whole.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from distserve.core.errors import ConfigError
from distserve.engine.checkpoint import inspect_checkpoint
from distserve.engine.loader import from_weights, model_class_for
from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.cut import Cut
from distserve.engine.sharding.shard import Shard
from distserve.engine.sharding.slicing import LazySlice

_LAYER_KEY = re.compile(r"^(?P<before>(?:.*\.)?(?:layers|h)\.)(?P<layer>\d+)\.(?P<name>.+)$")


def load_shard(
    config: PreTrainedConfig, model_dir: Path, dtype: str, shard: Shard, comm: Communicator
) -> tuple[PreTrainedModel, Cut]:
    """Load rank ``shard``'s part of the model in ``model_dir``, cast to ``dtype``.

    Raises:
        UnsupportedModelError: the model cannot be served, or only by one rank.
        ConfigError: the weights are missing, damaged or do not fit the configuration, or tp does not divide a width.
    """
    model_class = model_class_for(config)
    files = inspect_checkpoint(model_dir).files
    cuts: list[Cut] = []
    stored: dict[str, Any] = {}

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        cuts.append(Cut(self, shard, comm, stored))

    # transformers looks conversions up by the name of the class.
    part_class: Any = type(
        model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__}
    )
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    if is_tied and not shard.is_last:
        config.tie_word_embeddings = False  # the head, which shares them, is another stage's
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} cannot be read: {error}") from error
            stored.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118 - no mapping

        def slices() -> dict[str, LazySlice]:
            return _own_slices(stored, cuts[-1])

        def is_absent(name: str) -> bool:
            return cuts[-1].is_absent(name)

        module = from_weights(part_class, config, dtype, _Late(slices), model_dir, is_absent)
    cuts[-1].finish(module)
    return module, cuts[-1]


class _Late(dict[str, Any]):
    """A state dictionary made when it is first looked at: the cut that decides on it is made while loading."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def items(self) -> Any:
        if not self:
            self.update(self._make())
        return super().items()


def _own_slices(stored: dict[str, Any], cut: Cut) -> dict[str, LazySlice]:
    """The rank's slices of what is stored, layers numbered as the rank numbers them."""
    result = {}
    for name, tensor in stored.items():
        match = _LAYER_KEY.match(name)
        if match is None:
            if not cut.is_absent(name):
                result[name] = LazySlice(tensor, cut.of_checkpoint(name))
            continue
        slicing = cut.slicings.get(int(match["layer"]))
        if slicing is not None:
            local = int(match["layer"]) - cut.shard.layers.start
            result[f"{match['before']}{local}.{match['name']}"] = LazySlice(
                tensor, slicing.of_checkpoint(match["name"])
            )
    return result
