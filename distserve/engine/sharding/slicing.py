"""Which slice of each of a layer's tensors a shard has, and reading just that slice from a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distserve.core.errors import UnsupportedModelError
from distserve.engine.sharding.shard import Shard, Span

_EXPERT = re.compile(r"^(?P<module>.*experts)\.\d+\.(?P<name>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_EXPERT_DOWN = {"w2", "down_proj"}
_GROUPED_ROW_BYTES = 16
_QUERY = {"q_proj"}
_KEY_VALUE = {"k_proj", "v_proj"}


@dataclass(frozen=True, slots=True)
class Slicing:
    """Rows ``spans`` of dimension ``dim``, one after another."""

    dim: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Rows in all."""
        return sum(stop - start for start, stop in self.spans)

    def shape(self, full: torch.Size) -> torch.Size:
        """Shape of the slice of a tensor of shape ``full``."""
        return torch.Size([self.size if dim == self.dim else size for dim, size in enumerate(full)])


class LazySlice:
    """A slice of a tensor in a safetensors file, read when it is asked for: what transformers' loading expects."""

    def __init__(self, stored: Any, slicing: Slicing | None) -> None:
        """``stored`` is safetensors' own slice object; None takes all of it."""
        self._stored = stored
        self._slicing = slicing

    def __getitem__(self, index: object) -> Tensor:
        """The data; transformers asks for ``[...]``."""
        assert index is Ellipsis
        if self._slicing is None:
            whole: Tensor = self._stored[...]
            return whole
        before = (slice(None),) * self._slicing.dim
        parts = [self._stored[(*before, slice(start, stop))] for start, stop in self._slicing.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._slicing.dim)


class LayerSlicing:
    """The slices of one layer's tensors, by their names within the layer; a tensor not named is whole."""

    def __init__(self, layer: nn.Module, plan: Mapping[str, str], shard: Shard) -> None:
        """Work out the slices of ``layer``'s parameters, which still have their full shapes.

        Raises:
            ConfigError: tp does not divide a width.
            UnsupportedModelError: a module is laid out in a way that the plan's style does not tell.
        """
        self.parameters: dict[str, Slicing] = {}
        self._experts: dict[str, Span] = {}
        self._shard = shard
        modules = dict(layer.named_modules())
        parameters = dict(layer.named_parameters())
        for name, style in plan.items():
            if style == "moe_tp_experts":
                if name in modules:
                    self._add_experts(name, modules[name])
            elif name in modules:
                self._add_module(name, modules[name], style)
            elif name in parameters and not self._is_experts_parameter(name, plan):
                raise UnsupportedModelError(f"tp 1 only: the plan splits the parameter {name}, which is not known how")

    def of_checkpoint(self, name: str) -> Slicing | None:
        """The slice of a checkpoint's tensor; ``name`` is within the layer. Experts may be stored one by one."""
        match = _EXPERT.match(name)
        if match is None:
            return self.parameters.get(name)
        # Checkpoints may call the module that holds the experts otherwise than the model does.
        spans = set(self._experts.values())
        if not spans:
            return None
        assert len(spans) == 1
        return Slicing(1 if match["name"] in _EXPERT_DOWN else 0, (spans.pop(),))

    def has_narrow_experts(self, item_bytes: int) -> bool:
        """Whether rows of the shard's experts are no multiple of what torch's grouped matrix product asks for."""
        return any((stop - start) * item_bytes % _GROUPED_ROW_BYTES for start, stop in self._experts.values())

    @staticmethod
    def _is_experts_parameter(name: str, plan: Mapping[str, str]) -> bool:
        return plan.get(name.rpartition(".")[0]) == "moe_tp_experts"

    def _add_module(self, name: str, module: nn.Module, style: str) -> None:
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedModelError(f"tp 1 only: the plan splits {name}, a {type(module).__name__}")
        # Conv1D keeps its matrix as [in, out], Linear as [out, in].
        out_dim = 1 if isinstance(module, Conv1D) else 0
        num_out, num_in = module.weight.shape[out_dim], module.weight.shape[1 - out_dim]
        if style == "rowwise":
            self.parameters[f"{name}.weight"] = Slicing(1 - out_dim, (self._shard.even_rows(num_in, name),))
            return
        spans = self._out_spans(name, num_out, style)
        self.parameters[f"{name}.weight"] = Slicing(out_dim, spans)
        if module.bias is not None:
            self.parameters[f"{name}.bias"] = Slicing(0, spans)

    def _out_spans(self, name: str, num_out: int, style: str) -> tuple[Span, ...]:
        shard = self._shard
        last = name.rpartition(".")[2]
        if style == "fused_qkv":
            num_query, num_kv = shard.num_heads * shard.head_dim, shard.num_kv_heads * shard.head_dim
            return (shard.query_rows, _shift(shard.kv_rows, num_query), _shift(shard.kv_rows, num_query + num_kv))
        if style == "packed_colwise":
            half = shard.even_rows(num_out // 2, name)
            return (half, _shift(half, num_out // 2))
        if last in _QUERY:
            return (shard.query_rows,)
        if last in _KEY_VALUE:
            return (shard.kv_rows,)
        return (shard.even_rows(num_out, name),)

    def _add_experts(self, name: str, module: Any) -> None:
        shapes = {parameter: value.shape for parameter, value in module.named_parameters()}
        gate_up, down = shapes.get("gate_up_proj", torch.Size()), shapes.get("down_proj", torch.Size())
        if len(shapes) != 2 or len(down) != 3 or gate_up[1:] != (2 * down[2], down[1]):
            raise UnsupportedModelError(f"tp 1 only: the experts in {name} are laid out in a way of their own")
        width = down[2]
        rows = self._shard.even_rows(width, f"{name} (each expert)")
        self._experts[name] = rows
        self.parameters[f"{name}.gate_up_proj"] = Slicing(1, (rows, _shift(rows, width)))
        self.parameters[f"{name}.down_proj"] = Slicing(2, (rows,))


def _shift(span: Span, by: int) -> Span:
    return (span[0] + by, span[1] + by)
