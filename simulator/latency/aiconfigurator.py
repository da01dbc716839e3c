"""Step times from the kernel tables that NVIDIA measured: the optional package ``aiconfigurator-core``.

The package composes a model's step from measured GEMMs, attention, collectives and expert layers (Apache-2.0; about
300 MB installed, hence optional). It answers in microseconds of Python, too slow for a step at a time: its answers are
tabulated over token counts and batch sizes once per shape.
"""

import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec
from simulator.latency.gpus import find_gpu
from simulator.latency.kernels import Array
from simulator.latency.shape import ModelShape
from simulator.latency.tables import LARGEST, TabulatedStepTime

# Our names of the GPUs it has tables for.
_SYSTEMS = {
    "a100-80g-sxm": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
# Token counts and batch sizes it is asked about; in between, interpolation.
_GRID = np.unique(np.round(np.geomspace(1, LARGEST, 80)).astype(int))
_SHORT, _LONG = 1024, 8192
# Prompts among which a step's tokens are divided to tell what attention costs by pair from what it costs by token.
_PROMPTS = 8
_SEND_LATENCY = 1e-5


@dataclass(frozen=True)
class AiconfiguratorModel:
    """Step times of ``shape`` on ``cluster``'s GPUs by measured tables of one serving engine's kernels.

    ``model`` is what the package knows it by: a directory with its ``config.json``, or a hub name whose config comes
    with the package. ``backend`` is the engine whose kernels were measured: vllm, sglang or trtllm.
    """

    model: str | Path
    shape: ModelShape
    cluster: ClusterSpec
    backend: str = "vllm"

    @property
    def source(self) -> str:
        """See :class:`simulator.latency.interface.LatencyModel`."""
        version = importlib.metadata.version("aiconfigurator-core")
        return f"aiconfigurator-core {version}: {self.backend} kernels measured on {self.cluster.gpu}"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> TabulatedStepTime:
        """See :class:`simulator.latency.interface.LatencyModel`.

        Raises ConfigError if the package is missing, or has no tables for the GPU, engine or model.
        """
        self.shape.check(parallel)
        handle = self._compile(parallel)
        token, row, prefill, pair, decode, context = self._measure(handle)
        counts = np.arange(LARGEST + 1)
        share = self.shape.layers_per_stage(parallel) / self.shape.num_layers

        def table(values: Array, scale: float = share) -> list[float]:
            found: list[float] = (np.interp(counts, _GRID, values) * (scale / 1e3)).tolist()
            return found

        cluster = self.cluster
        bandwidth = cluster.intra_node_bandwidth * parallel.tp
        if not stages_share_node:
            cards = max(1, parallel.tp * cluster.nics_per_node // cluster.gpus_per_node)
            bandwidth = cluster.inter_node_bandwidth * cards
        return TabulatedStepTime(
            token=table(token),
            row=table(row, 1.0),
            prefill=table(prefill),
            pair=table(pair),
            decode=table(decode),
            context=table(context),
            mixed=1.0,
            serial=0.0,
            floor_prefill=0.0,
            floor_decode=0.0,
            send_latency=_SEND_LATENCY,
            send_per_token=self.shape.hidden * self.shape.dtype_bytes / bandwidth,
        )

    @cached_property
    def _engine(self) -> Any:
        find_gpu(self.cluster.gpu)
        if self.cluster.gpu not in _SYSTEMS:
            raise ConfigError(
                f"aiconfigurator-core has no tables for {self.cluster.gpu}; it has {', '.join(_SYSTEMS)}. "
                "Use the analytic latency model"
            )
        try:
            return importlib.import_module("aiconfigurator_core.sdk.engine")
        except ImportError as error:
            raise ConfigError(
                "step times by aiconfigurator need the package aiconfigurator-core: pip install aiconfigurator-core"
            ) from error

    def _compile(self, parallel: ParallelConfig) -> Any:
        experts = {"moe_tp_size": parallel.tp} if self.shape.num_experts else {}
        system = _SYSTEMS.get(self.cluster.gpu, "")
        engine = self._engine
        try:
            return engine.EngineHandle.compile(
                str(self.model), system, self.backend, tp_size=parallel.tp, pp_size=1, **experts
            )
        except Exception as error:  # of many kinds, the package's own and Rust's
            raise ConfigError(
                f"aiconfigurator-core has no step times of {self.model} at tp {parallel.tp} with {self.backend} on "
                f"{self.cluster.gpu}: {error}"
            ) from error

    @staticmethod
    def _measure(handle: Any) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Milliseconds over the grid: of tokens, of logits' rows, and attention's constants and slopes."""
        columns = []
        for number in (int(count) for count in _GRID):
            long, short = (_split(handle.decode_step_per_op(number, length, 2)) for length in (_LONG, _SHORT))
            context = max(long["attention"] - short["attention"], 0.0) / (number * (_LONG - _SHORT))
            decode = max(short["attention"] - context * number * _SHORT, 0.0)
            whole = _split(handle.run_static_per_op(batch_size=1, isl=number, osl=1)[0])
            pair, prefill = 0.0, whole["attention"]
            if number >= 16 * _PROMPTS:
                length = number // _PROMPTS
                parts = _split(handle.run_static_per_op(batch_size=_PROMPTS, isl=length, osl=1)[0])
                saved = (number * (number + 1) - _PROMPTS * length * (length + 1)) / 2
                pair = max(whole["attention"] - parts["attention"], 0.0) / saved
                prefill = max(prefill - pair * number * (number + 1) / 2, 0.0)
            columns.append((short["tokens"], short["logits"], prefill, pair, decode, context))
        token, row, prefills, pairs, decodes, contexts = np.array(columns).T
        # Short prompts tell nothing of a pair's cost: it is that of the shortest that does.
        first = int(np.argmax(pairs > 0))
        pairs[:first] = pairs[first]
        return token, row, prefills, pairs, decodes, contexts


def _split(operations: list[tuple[str, float, float, str]]) -> dict[str, float]:
    """Milliseconds of a step's attention, logits, and all else."""
    found = {"attention": 0.0, "logits": 0.0, "tokens": 0.0}
    for name, milliseconds, *_ in operations:
        kind = "attention" if "attention" in name else "logits" if "logits" in name else "tokens"
        found[kind] += milliseconds
    return found
