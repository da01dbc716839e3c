"""Step times from first principles: every kernel of a step by its own roofline, for any model on any known GPU.

The kernels' formulas are :mod:`simulator.latency.kernels`, their coefficients :mod:`simulator.latency.efficiency`. A
simulation asks for millions of step times, so a shape's kernels are evaluated once, over all numbers of tokens and
sequences, and a step adds up four table entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency.efficiency import Efficiency, Engine, find_engine, kernels_of
from simulator.latency.gpus import BORROWED, find_gpu
from simulator.latency.kernels import Array
from simulator.latency.operations import Operation
from simulator.latency.shape import ModelShape
from simulator.latency.step_kernels import Launches, StepKernels
from simulator.latency.tables import LARGEST, TabulatedStepTime


class AnalyticModel:
    """The analytic source of latencies: ``shape`` on ``cluster``'s GPUs.

    ``engine`` is a name in ``coefficients.toml``, or an engine of one's own; ``efficiency`` replaces the kernels'
    coefficients fitted for the card. Raises ConfigError for an unknown GPU or engine.
    """

    def __init__(
        self,
        shape: ModelShape,
        cluster: ClusterSpec,
        *,
        engine: str | Engine = "vllm",
        efficiency: Efficiency | None = None,
    ) -> None:
        self.shape = shape
        self.cluster = cluster
        self.gpu = find_gpu(cluster.gpu)
        self.engine = find_engine(engine) if isinstance(engine, str) else engine
        self.efficiency = self.engine.applied(efficiency or kernels_of(self.gpu.kernels))
        self._engine_name = engine if isinstance(engine, str) else "given"

    @property
    def source(self) -> str:
        """See :class:`simulator.latency.interface.LatencyModel`."""
        kernels = self.gpu.kernels
        fitted = f"coefficients of {BORROWED.get(kernels, kernels)}" + ", at its own clock" * (kernels in BORROWED)
        if kernels == "default":
            fitted = "coefficients of an average card"
        return f"analytic roofline of {self.shape.name} on {self.gpu.name} ({fitted}, engine {self._engine_name})"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> TabulatedStepTime:
        """See :class:`simulator.latency.interface.LatencyModel`."""
        parts = self._kernels(parallel)
        counts = np.arange(LARGEST + 1, dtype=np.float64)
        counts[0] = 1.0  # no step is empty; the entry only has to be a number
        ones, zeros = np.ones_like(counts), np.zeros_like(counts)
        layers = parts.layers
        token = _total(parts.of_tokens(counts))
        row = _total(parts.of_rows(counts)) + self.engine.sequence * counts
        prefill, decode = _total([parts.prefill(counts, zeros)]), _total([parts.decode(counts, zeros)])
        send = parts.send(np.array([0.0, 1.0]), stages_share_node=stages_share_node).seconds
        return TabulatedStepTime(
            token=token.tolist(),
            row=row.tolist(),
            prefill=prefill.tolist(),
            pair=(_total([parts.prefill(counts, ones)]) - prefill).tolist(),
            decode=decode.tolist(),
            context=(_total([parts.decode(counts, ones)]) - decode).tolist(),
            mixed=self.efficiency.mixed_decode,
            serial=self.engine.step + layers * self.engine.layer,
            floor_prefill=layers * self.engine.host_prefill,
            floor_decode=layers * self.engine.host_decode,
            send_latency=float(send[0]),
            send_per_token=float(send[1] - send[0]),
        )

    def seconds(self, parallel: ParallelConfig, steps: Sequence[StepShape]) -> Array:
        """The seconds of ``steps``, [S], as :meth:`step_time` gives them, without building its tables."""
        parts = self._kernels(parallel)
        prefill_tokens, pairs, prompts, decodes, context = np.array(
            [(s.num_prefill_tokens, s.prefill_pairs, s.num_prefills, s.num_decodes, s.decode_context) for s in steps],
            dtype=np.float64,
        ).T
        has_prefill, has_decode = prefill_tokens > 0, decodes > 0
        rows = np.maximum(prompts + decodes, 1)
        time = _total(parts.of_tokens(prefill_tokens + decodes)) + _total(parts.of_rows(rows))
        time += has_prefill * _total([parts.prefill(np.maximum(prefill_tokens, 1), pairs)])
        attention = _total([parts.decode(np.maximum(decodes, 1), context)])
        time += has_decode * np.where(has_prefill, self.efficiency.mixed_decode, 1) * attention
        time += self.engine.sequence * rows
        floor = parts.layers * np.where(has_prefill, self.engine.host_prefill, self.engine.host_decode)
        total: Array = np.maximum(time, floor) + self.engine.step + parts.layers * self.engine.layer
        return total

    def operations(self, parallel: ParallelConfig, step: StepShape) -> tuple[Operation, ...]:
        """The kernels of ``step`` on one rank of the fullest stage; their seconds add up to the step's."""
        parts = self._kernels(parallel)
        rows = _one(max(step.num_prefills + step.num_decodes, 1))
        launches = list(parts.of_tokens(_one(step.num_prefill_tokens + step.num_decodes)))
        if step.num_prefill_tokens:
            launches.append(parts.prefill(_one(step.num_prefill_tokens), _one(step.prefill_pairs)))
        if step.num_decodes:
            decode = parts.decode(_one(step.num_decodes), _one(step.decode_context))
            slower = self.efficiency.mixed_decode if step.num_prefill_tokens else 1.0
            launches.append(replace(decode, cost=replace(decode.cost, seconds=decode.cost.seconds * slower)))
        launches += parts.of_rows(rows)
        found = [Operation.of(launch, self.gpu) for launch in launches]
        busy = sum(operation.total_seconds for operation in found)
        floor = parts.layers * (self.engine.host_prefill if step.num_prefill_tokens else self.engine.host_decode)
        host = self.engine.step + parts.layers * self.engine.layer + float(rows[0]) * self.engine.sequence
        idle = max(floor - busy - float(rows[0]) * self.engine.sequence, 0.0)
        return (*found, Operation("engine", 1, host + idle, 0.0, 0.0, "host"))

    def _kernels(self, parallel: ParallelConfig) -> StepKernels:
        self._check(parallel)
        return StepKernels(self.shape, parallel, self.cluster, self.gpu, self.efficiency)

    def _check(self, parallel: ParallelConfig) -> None:
        self.shape.check(parallel)
        if parallel.tp > self.cluster.gpus_per_node:
            raise ConfigError(
                f"tp {parallel.tp} does not fit a node of {self.cluster.gpus_per_node} GPUs: a layer's shards share one"
            )


def _total(launches: Iterable[Launches]) -> Array:
    seconds: Array = np.sum([launch.count * launch.cost.seconds for launch in launches], axis=0)
    return seconds


def _one(number: int) -> Array:
    return np.array([float(number)])
