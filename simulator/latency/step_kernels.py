"""Which kernels a step launches on one rank of an instance's fullest pipeline stage, and what each costs.

The model's architecture becomes shapes of kernels here; how long a kernel of a shape takes is
:mod:`simulator.latency.kernels`' knowledge.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from distserve.core.config import ParallelConfig
from distserve.core.topology import ClusterSpec
from simulator.latency import kernels
from simulator.latency.efficiency import Efficiency
from simulator.latency.gpus import GpuSpec
from simulator.latency.kernels import Array, Cost
from simulator.latency.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Launches:
    """``count`` launches of one kernel, the ``cost`` of each."""

    name: str
    count: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class StepKernels:
    """The kernels of ``shape`` split as ``parallel``, on ``cluster``'s ``gpu`` at ``efficiency``.

    All methods are vectorised: an array of token counts (at least 1) in, the costs of as many steps out. The fullest
    stage is one with ``layers`` layers that also has the embedding and the output matrix.
    """

    shape: ModelShape
    parallel: ParallelConfig
    cluster: ClusterSpec
    gpu: GpuSpec
    efficiency: Efficiency

    @property
    def layers(self) -> int:
        """Layers of the fullest stage."""
        return self.shape.layers_per_stage(self.parallel)

    def of_tokens(self, tokens: Array) -> Iterator[Launches]:
        """What depends on the number of tokens alone: everything but attention and output matrix."""
        shape, tp, layers = self.shape, self.parallel.tp, self.layers
        item, hidden = shape.dtype_bytes, shape.hidden
        yield Launches("embedding", 1, self._stream(2 * hidden * item * tokens))
        yield Launches("norm and residual", 2 * layers, self._stream(4 * hidden * item * tokens))
        yield from self._projections(tokens)
        dense = layers * (shape.num_layers - shape.num_moe_layers) // shape.num_layers
        moe = layers - dense
        gates = 2 if shape.gated_mlp else 1
        if dense:
            inner = shape.intermediate // tp
            yield Launches("mlp up", dense, self._gemm(tokens, gates * inner, hidden))
            yield Launches("activation", dense, self._stream((gates + 1) * inner * item * tokens))
            yield Launches("mlp down", dense, self._gemm(tokens, hidden, inner))
        if moe:
            inner = shape.expert_intermediate // tp
            yield Launches("router", moe, self._gemm(tokens, shape.num_experts, hidden))
            cost = kernels.experts(
                self.gpu,
                self.efficiency,
                tokens,
                hidden,
                inner,
                shape.num_experts,
                shape.experts_per_token,
                item,
                gates,
                shape.weight_item,
            )
            yield Launches("experts", moe, cost)
            if shape.shared_intermediate:
                shared = shape.shared_intermediate // tp
                yield Launches("shared expert up", moe, self._gemm(tokens, gates * shared, hidden))
                yield Launches("shared expert down", moe, self._gemm(tokens, hidden, shared))
        if tp > 1:
            size = tokens * hidden * item
            cost = kernels.all_reduce(self.cluster.intra_node_bandwidth, self.efficiency, size, tp)
            yield Launches("all-reduce", 2 * layers, cost)

    def _projections(self, tokens: Array) -> Iterator[Launches]:
        shape, layers = self.shape, self.layers
        item, hidden, latent = shape.dtype_bytes, shape.hidden, shape.latent
        heads, kv_heads, head_dim = self._heads
        if latent is None:
            width, kv_width = heads * head_dim, kv_heads * head_dim
            yield Launches("qkv projection", layers, self._gemm(tokens, width + 2 * kv_width, hidden))
            yield Launches("rotary and KV write", layers, self._stream((2 * width + 4 * kv_width) * item * tokens))
            yield Launches("output projection", layers, self._gemm(tokens, hidden, width))
            return
        yield Launches("latent projection", layers, self._gemm(tokens, latent.query_rank + latent.cached, hidden))
        yield Launches("query projection", layers, self._gemm(tokens, heads * head_dim, latent.query_rank or hidden))
        moved = 2 * heads * latent.rope + 2 * latent.cached
        yield Launches("rotary and KV write", layers, self._stream(moved * item * tokens))
        # Of prompts: keys and values are made of what is cached. Of decodes the same products are taken with the
        # queries and the outcome instead (DeepSeek-V2's absorption), which is as much work.
        columns = heads * (latent.nope + latent.value)
        yield Launches("key and value projection", layers, self._gemm(tokens, columns, latent.kv_rank))
        yield Launches("output projection", layers, self._gemm(tokens, hidden, heads * latent.value))

    def of_rows(self, rows: Array) -> Iterator[Launches]:
        """What depends on the number of sequences that get a token: logits, and sampling in 32 bits."""
        columns = -(-self.shape.vocab // self.parallel.tp)
        item = self.shape.dtype_bytes
        cost = kernels.gemm(self.gpu, self.efficiency, rows, columns, self.shape.hidden, item)
        yield Launches("output matrix", 1, cost)
        yield Launches("sampling", 1, self._stream(3 * 4 * self.shape.vocab * rows))

    def prefill(self, tokens: Array, pairs: Array) -> Launches:
        """Attention of prompts, affine in ``pairs``."""
        item = self.shape.dtype_bytes
        cost = kernels.prefill_attention(self.gpu, self.efficiency, tokens, pairs, *self._prefill_heads, item)
        return Launches("prefill attention", self.layers, cost)

    def decode(self, sequences: Array, context: Array) -> Launches:
        """Attention of decodes, affine in ``context``."""
        item = self.shape.dtype_bytes
        cost = kernels.decode_attention(self.gpu, self.efficiency, sequences, context, *self._decode_heads, item)
        return Launches("decode attention", self.layers, cost)

    def send(self, tokens: Array, *, stages_share_node: bool) -> Cost:
        """Activations to the next stage: each shard sends its share; those of a node share the node's cards."""
        cluster, tp = self.cluster, self.parallel.tp
        size = tokens * self.shape.hidden * self.shape.dtype_bytes
        if stages_share_node:
            return kernels.send(cluster.intra_node_bandwidth * tp, self.efficiency, size)
        cards = max(1, tp * cluster.nics_per_node // cluster.gpus_per_node)
        return kernels.send(cluster.inter_node_bandwidth * cards, self.efficiency, size)

    @property
    def _heads(self) -> tuple[int, int, int]:
        return (
            self.shape.num_heads // self.parallel.tp,
            self.shape.kv_heads_per_rank(self.parallel),
            self.shape.head_dim,
        )

    @property
    def _prefill_heads(self) -> tuple[int, int, int]:
        """(query heads, KV heads, columns) of plain attention with as much work as a prompt's."""
        heads, kv_heads, head_dim = self._heads
        latent = self.shape.latent
        # Of latent attention every head has keys and values of its own; values are narrower.
        return (heads, kv_heads, head_dim) if latent is None else (heads, heads, (head_dim + latent.value) // 2)

    @property
    def _decode_heads(self) -> tuple[float, int, int]:
        """(query heads, KV heads, columns) of plain attention with as much work and traffic as a decode's."""
        heads, kv_heads, head_dim = self._heads
        latent = self.shape.latent
        if latent is None:
            return heads, kv_heads, head_dim
        # All heads read the same columns, once: keys are all of them, values those that are not rotated.
        return heads * (latent.cached + latent.kv_rank) / latent.cached, kv_heads, latent.cached // 2

    def _gemm(self, m: Array, n: int, k: int) -> Cost:
        shape = self.shape
        return kernels.gemm(self.gpu, self.efficiency, m, n, k, shape.dtype_bytes, weight_item=shape.weight_item)

    def _stream(self, traffic: Array) -> Cost:
        return kernels.stream(self.gpu, self.efficiency, traffic)
