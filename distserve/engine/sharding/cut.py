"""Cuts a freshly built transformers model down to one rank's part, before any weight is read.

The model keeps its own class's forward. Layers of other stages are gone; a stage that is not the first has its first
layer fed what the stage before computed, in place of embeddings it does not hold; one that is not the last has what its
last layer returns taken out and neither norm nor head. Matrices keep their names and become slices; where a shard's
result is a part of a sum, the sum is taken right there.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distserve.core.errors import UnsupportedModelError
from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.plan import layer_plan
from distserve.engine.sharding.shard import Shard
from distserve.engine.sharding.slicing import LayerSlicing, Slicing
from distserve.engine.sharding.vocabulary import VocabularySplit

_BEFORE_LAYERS = {"project_in"}
_AFTER_LAYERS = {"norm", "final_layer_norm", "ln_f", "final_norm", "project_out"}


class Blank(nn.Module):
    """Stands for a module of another stage: zeros of its width, whatever it is given ([1, T, ...] to [1, T, width])."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def forward(self, given: Tensor, *_: object, **__: object) -> Tensor:
        """See the class."""
        return torch.zeros((*given.shape[:2], self.width), dtype=self.dtype, device=given.device)


class SummedLinear(nn.Module):
    """A linear layer whose input is split over the shards: the shards' products are summed, then the bias is added."""

    def __init__(self, source: nn.Linear | Conv1D, weight: nn.Parameter, comm: Communicator) -> None:
        super().__init__()
        self.weight = weight
        self.bias = source.bias
        self.is_transposed = isinstance(source, Conv1D)
        self._comm = comm

    def forward(self, given: Tensor) -> Tensor:
        """[..., in of this shard] to [..., out]."""
        product = given @ (self.weight if self.is_transposed else self.weight.t())
        total = self._comm.sum(product)
        return total if self.bias is None else total + self.bias


class Cut:
    """What was cut, and the places where activations enter and leave."""

    def __init__(self, module: PreTrainedModel, shard: Shard, comm: Communicator, stored: Collection[str]) -> None:
        """Cut ``module``, which has no storage yet; ``stored`` are the names of the checkpoint's tensors.

        Raises:
            ConfigError: tp does not divide a width of the model.
            UnsupportedModelError: the model can only be served whole.
        """
        self.shard = shard
        self.layers_path, layers = find_layers(module, shard.num_layers)
        decoder = module.get_submodule(self.layers_path.rpartition(".")[0])
        self._absent: set[str] = set()
        own = [layers[number] for number in shard.layers]
        setattr(decoder, self.layers_path.rpartition(".")[2], nn.ModuleList(own))
        if shard.parallel.pp > 1:
            self._cut_stage(module, decoder)
        # Layers may differ (dense ones among experts), so each has slices of its own.
        plan = layer_plan(module) if shard.parallel.tp > 1 else {}
        self.slicings = dict(zip(shard.layers, (self._cut_layer(layer, plan, comm) for layer in own), strict=True))
        self._vocabulary = VocabularySplit(module, shard, comm, stored) if shard.parallel.tp > 1 else None
        self.entering: Tensor | None = None
        self.leaving: Tensor | None = None
        if not shard.is_first:
            own[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        if not shard.is_last:
            own[-1].register_forward_hook(self._leave)

    def of_checkpoint(self, name: str) -> Slicing | None:
        """The rank's slice of the tensor ``name``, which belongs to no layer; None: all of it."""
        return None if self._vocabulary is None else self._vocabulary.of_checkpoint(name)

    def is_absent(self, name: str) -> bool:
        """Whether the tensor ``name``, which belongs to no layer, is another stage's."""
        return not self._absent.isdisjoint(name.split("."))

    def finish(self, module: PreTrainedModel) -> None:
        """Tell a loaded model's forward of its new sizes; before, they still say how to set up rotary tables."""
        shard, config = self.shard, module.config
        layer_types = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(shard.layers)
        if any(slicing.has_narrow_experts(module.dtype.itemsize) for slicing in self.slicings.values()):
            module.set_experts_implementation("eager")
        if layer_types is not None:
            config.layer_types = [layer_types[number] for number in shard.layers]
        if shard.parallel.tp == 1:
            return
        config.num_attention_heads = shard.num_local_heads
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = len(shard.kv_heads)

    def _cut_stage(self, module: PreTrainedModel, decoder: nn.Module) -> None:
        shard, config = self.shard, module.config
        model: Any = module  # some of its methods are not typed
        is_tied = bool(getattr(config, "tie_word_embeddings", False))
        kept = module.get_input_embeddings() if shard.is_last and is_tied else None
        children: list[tuple[str, Any]] = list(decoder.named_children())
        for name, child in children:
            if not shard.is_first and child is not kept and (isinstance(child, nn.Embedding) or name in _BEFORE_LAYERS):
                width = child.embedding_dim if isinstance(child, nn.Embedding) else child.out_features
                self._remove(decoder, name, Blank(width, module.dtype))
            if not shard.is_last and name in _AFTER_LAYERS:
                self._remove(decoder, name, nn.Identity())
        if not shard.is_last:
            head = model.get_output_embeddings()
            name = next(name for name, child in module.named_modules() if child is head)
            assert "." not in name
            self._remove(module, name, nn.Identity())

    def _remove(self, parent: nn.Module, name: str, stand_in: nn.Module) -> None:
        setattr(parent, name, stand_in)
        self._absent.add(name)

    def _cut_layer(self, layer: nn.Module, plan: Mapping[str, str], comm: Communicator) -> LayerSlicing:
        shard = self.shard
        slicing = LayerSlicing(layer, plan, shard)
        for name, slice_ in slicing.parameters.items():
            path, _, last = name.rpartition(".")
            owner: Any = layer.get_submodule(path)
            full = getattr(owner, last)
            setattr(owner, last, nn.Parameter(full.new_empty(slice_.shape(full.shape)), requires_grad=False))
            if isinstance(owner, Conv1D):
                owner.nf = owner.weight.shape[1]
        for name, style in plan.items():
            owner = dict(layer.named_modules()).get(name)
            if style == "rowwise" and owner is not None:
                path, _, last = name.rpartition(".")
                setattr(layer.get_submodule(path), last, SummedLinear(owner, owner.weight, comm))
            if style == "moe_tp_experts" and owner is not None:
                owner.register_forward_hook(lambda _module, _args, output: comm.sum(output))
        for part in layer.modules():
            self._resize(part)
        return slicing

    def _resize(self, part: Any) -> None:
        """Heads and layer numbers as the rank counts them."""
        shard = self.shard
        if isinstance(getattr(part, "layer_idx", None), int):
            part.layer_idx -= shard.layers.start
        if shard.parallel.tp == 1:
            return
        sizes = {
            "num_heads": shard.num_local_heads,
            "num_attention_heads": shard.num_local_heads,
            "num_key_value_heads": len(shard.kv_heads),
            "num_key_value_groups": shard.num_local_heads // len(shard.kv_heads),
            "split_size": shard.num_local_heads * shard.head_dim,
        }
        for name, size in sizes.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, size)

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        assert self.entering is not None
        if args:
            return (self.entering, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.entering}

    def _leave(self, _: nn.Module, __: object, output: Any) -> None:
        self.leaving = output[0] if isinstance(output, tuple) else output


def find_layers(module: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path.

    Raises:
        UnsupportedModelError: there is none.
    """
    found: Iterator[tuple[str, nn.ModuleList]] = (
        (path, part)
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == num_layers and path.rpartition(".")[2] in {"layers", "h"}
    )
    for path, part in found:
        return path, part
    raise UnsupportedModelError("tp 1 and pp 1 only: the model's layers are not in one list")
