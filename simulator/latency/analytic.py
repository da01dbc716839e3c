"""Step times from first principles: every kernel of a step by its own roofline, for any model on any known GPU.

The kernels' formulas are :mod:`simulator.latency.kernels`, their coefficients :mod:`simulator.latency.efficiency`. A
simulation asks for millions of step times, so a shape's kernels are evaluated once, over all numbers of tokens and
sequences, and a step adds up four table entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency import kernels
from simulator.latency.efficiency import Efficiency, Engine, find_engine, kernels_of
from simulator.latency.gpus import find_gpu
from simulator.latency.kernels import Array, Cost, Number
from simulator.latency.operations import Operation
from simulator.latency.shape import ModelShape

# Steps of more tokens or sequences than this are extrapolated: kernels of that size run at a steady rate.
_TABLE = 8192


@dataclass(frozen=True, slots=True)
class AnalyticStepTime:
    """One instance shape's times: entry ``i`` of a table is that of ``i`` tokens or sequences, the last slope goes on.

    ``token`` is all that depends on the number of tokens alone, ``row`` on the rows whose logits are computed. All
    attention takes ``prefill`` by prompt tokens, ``pair`` of it for each (query, key) pair, ``decode`` by decodes, ``context`` of
    it for each cached token. ``serial`` comes on top; ``floor_prefill`` and ``floor_decode`` are what the host needs to
    launch it all.
    """

    token: list[float]
    row: list[float]
    prefill: list[float]
    pair: list[float]
    decode: list[float]
    context: list[float]
    serial: float
    floor_prefill: float
    floor_decode: float
    send_latency: float
    send_per_token: float

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        num_prefill_tokens = shape.num_prefill_tokens
        num_decodes = shape.num_decodes
        num_tokens = num_prefill_tokens + num_decodes
        if num_tokens > _TABLE:
            return self._beyond(shape)
        time = self.token[num_tokens] + self.row[shape.num_prefills + num_decodes]
        floor = self.floor_decode
        if num_prefill_tokens:
            time += self.prefill[num_prefill_tokens] + shape.prefill_pairs * self.pair[num_prefill_tokens]
            floor = self.floor_prefill
        if num_decodes:
            time += self.decode[num_decodes] + shape.decode_context * self.context[num_decodes]
        return self.serial + (time if time > floor else floor)  # noqa: FURB136 -- half the time of max()

    def _beyond(self, shape: StepShape) -> float:
        num_prefill_tokens, num_decodes = shape.num_prefill_tokens, shape.num_decodes
        time = _extended(self.token, num_prefill_tokens + num_decodes)
        time += _extended(self.row, shape.num_prefills + num_decodes)
        if num_prefill_tokens:
            time += _extended(self.prefill, num_prefill_tokens)
            time += shape.prefill_pairs * self.pair[min(num_prefill_tokens, _TABLE)]
        if num_decodes:
            time += _extended(self.decode, num_decodes)
            time += shape.decode_context * self.context[min(num_decodes, _TABLE)]
        return self.serial + max(time, self.floor_prefill if num_prefill_tokens else self.floor_decode)

    def handover(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        return self.send_latency + self.send_per_token * (shape.num_prefill_tokens + shape.num_decodes)


def _extended(table: list[float], index: int) -> float:
    if index <= _TABLE:
        return table[index]
    half = _TABLE // 2
    return table[_TABLE] + (table[_TABLE] - table[half]) / (_TABLE - half) * (index - _TABLE)


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
        fitted = "the nearest fitted card" if self.gpu.kernels == "default" else f"coefficients of {self.gpu.kernels}"
        return f"analytic roofline of {self.shape.name} on {self.gpu.name} ({fitted}, engine {self._engine_name})"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> AnalyticStepTime:
        """See :class:`simulator.latency.interface.LatencyModel`."""
        self._check(parallel)
        counts = np.arange(_TABLE + 1, dtype=np.float64)
        counts[0] = 1.0  # no step is empty; the entry only has to be a number
        ones, zeros = np.ones_like(counts), np.zeros_like(counts)
        layers = self.shape.layers_per_stage(parallel)
        token, row = zeros.copy(), self.engine.sequence * counts
        for _, count, cost in self._token_kernels(parallel, counts):
            token += count * cost.seconds
        for _, count, cost in self._row_kernels(parallel, counts):
            row += count * cost.seconds
        prefill = layers * self._prefill(parallel, counts, zeros).seconds
        decode = layers * self._decode(parallel, counts, zeros).seconds
        send = self._send(parallel, np.array([0.0, 1.0]), stages_share_node=stages_share_node).seconds
        return AnalyticStepTime(
            token=token.tolist(),
            row=row.tolist(),
            prefill=prefill.tolist(),
            pair=(layers * self._prefill(parallel, counts, ones).seconds - prefill).tolist(),
            decode=decode.tolist(),
            context=(layers * self._decode(parallel, counts, ones).seconds - decode).tolist(),
            serial=self.engine.step + layers * self.engine.layer,
            floor_prefill=layers * self.engine.host_prefill,
            floor_decode=layers * self.engine.host_decode,
            send_latency=float(send[0]),
            send_per_token=float(send[1] - send[0]),
        )

    def operations(self, parallel: ParallelConfig, step: StepShape) -> tuple[Operation, ...]:
        """The kernels of ``step`` on one rank of the fullest stage, in order; their seconds add up to the step's."""
        self._check(parallel)
        tokens = np.array([float(step.num_prefill_tokens + step.num_decodes)])
        rows = np.array([float(step.num_prefills + step.num_decodes)])
        layers = self.shape.layers_per_stage(parallel)
        costs = list(self._token_kernels(parallel, tokens))
        if step.num_prefill_tokens:
            prefill = self._prefill(
                parallel, np.array([float(step.num_prefill_tokens)]), np.array([float(step.prefill_pairs)])
            )
            costs.append(("prefill attention", layers, prefill))
        if step.num_decodes:
            decode = self._decode(parallel, np.array([float(step.num_decodes)]), np.array([float(step.decode_context)]))
            costs.append(("decode attention", layers, decode))
        costs += self._row_kernels(parallel, rows)
        found = [
            Operation.of(name, count, float(cost.seconds[0]), float(cost.flops[0]), float(cost.bytes[0]), self.gpu)
            for name, count, cost in costs
        ]
        busy = sum(operation.total_seconds for operation in found)
        floor = layers * (self.engine.host_prefill if step.num_prefill_tokens else self.engine.host_decode)
        host = self.engine.step + layers * self.engine.layer + float(rows[0]) * self.engine.sequence
        return (*found, Operation("engine", 1, host + max(floor - busy, 0.0), 0.0, 0.0, "host"))

    def _check(self, parallel: ParallelConfig) -> None:
        self.shape.check(parallel)
        if parallel.tp > self.cluster.gpus_per_node:
            raise ConfigError(
                f"tp {parallel.tp} does not fit a node of {self.cluster.gpus_per_node} GPUs: a layer's shards share one"
            )

    def _token_kernels(self, parallel: ParallelConfig, tokens: Array) -> Iterable[tuple[str, int, Cost]]:
        """(name, launches, cost of one) of what depends on the number of tokens alone."""
        shape, tp = self.shape, parallel.tp
        layers, item, hidden = shape.layers_per_stage(parallel), shape.dtype_bytes, shape.hidden
        heads, kv_heads = shape.num_heads // tp, shape.kv_heads_per_rank(parallel)
        width, kv_width = heads * shape.head_dim, kv_heads * shape.head_dim
        yield "embedding", 1, self._stream(2 * hidden * item * tokens)
        yield "norm and residual", 2 * layers, self._stream(4 * hidden * item * tokens)
        yield "qkv projection", layers, self._gemm(tokens, width + 2 * kv_width, hidden)
        yield "rotary and KV write", layers, self._stream((2 * width + 4 * kv_width) * item * tokens)
        yield "output projection", layers, self._gemm(tokens, hidden, width)
        dense = layers * (shape.num_layers - shape.num_moe_layers) // shape.num_layers
        moe = layers - dense
        gates = 2 if shape.gated_mlp else 1
        if dense:
            inner = shape.intermediate // tp
            yield "mlp up", dense, self._gemm(tokens, gates * inner, hidden)
            yield "activation", dense, self._stream((gates + 1) * inner * item * tokens)
            yield "mlp down", dense, self._gemm(tokens, hidden, inner)
        if moe:
            inner = shape.expert_intermediate // tp
            share = shape.experts_per_token / shape.num_experts
            touched = shape.num_experts * -np.expm1(tokens * np.log1p(-min(share, 1 - 1e-12)))
            yield "router", moe, self._gemm(tokens, shape.num_experts, hidden)
            each = tokens * shape.experts_per_token / touched
            yield "experts up", moe, self._gemm(each, gates * inner, hidden, touched)
            yield "activation", moe, self._stream((gates + 1) * inner * item * tokens * shape.experts_per_token)
            yield "experts down", moe, self._gemm(each, hidden, inner, touched)
            if shape.shared_intermediate:
                shared = shape.shared_intermediate // tp
                yield "shared expert up", moe, self._gemm(tokens, gates * shared, hidden)
                yield "shared expert down", moe, self._gemm(tokens, hidden, shared)
        if tp > 1:
            size = tokens * hidden * item
            cost = kernels.all_reduce(self.cluster.intra_node_bandwidth, self.efficiency, size, tp)
            yield "all-reduce", 2 * layers, cost

    def _row_kernels(self, parallel: ParallelConfig, rows: Array) -> Iterable[tuple[str, int, Cost]]:
        columns = -(-self.shape.vocab // parallel.tp)
        yield "output matrix", 1, self._gemm(rows, columns, self.shape.hidden)
        yield "sampling", 1, self._stream(3 * 4 * self.shape.vocab * rows)

    def _gemm(self, m: Array, n: int, k: int, groups: Number = 1.0) -> Cost:
        return kernels.gemm(self.gpu, self.efficiency, m, n, k, self.shape.dtype_bytes, groups)

    def _stream(self, traffic: Array) -> Cost:
        return kernels.stream(self.gpu, self.efficiency, traffic)

    def _prefill(self, parallel: ParallelConfig, tokens: Array, pairs: Array) -> Cost:
        return kernels.prefill_attention(
            self.gpu, self.efficiency, tokens, pairs, *self._heads(parallel), self.shape.dtype_bytes
        )

    def _decode(self, parallel: ParallelConfig, batch: Array, context: Array) -> Cost:
        return kernels.decode_attention(
            self.gpu, self.efficiency, batch, context, *self._heads(parallel), self.shape.dtype_bytes
        )

    def _heads(self, parallel: ParallelConfig) -> tuple[int, int, int]:
        return self.shape.num_heads // parallel.tp, self.shape.kv_heads_per_rank(parallel), self.shape.head_dim

    def _send(self, parallel: ParallelConfig, tokens: Array, *, stages_share_node: bool) -> Cost:
        """Activations to the next stage: each shard sends its share; those of a node share the node's cards."""
        cluster = self.cluster
        size = tokens * self.shape.hidden * self.shape.dtype_bytes
        if stages_share_node:
            return kernels.send(cluster.intra_node_bandwidth * parallel.tp, self.efficiency, size)
        cards = max(1, parallel.tp * cluster.nics_per_node // cluster.gpus_per_node)
        return kernels.send(cluster.inter_node_bandwidth * cards, self.efficiency, size)
