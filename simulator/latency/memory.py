"""How many KV blocks an instance has once its weights and its steps' workspace are in GPU memory."""

from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError
from simulator.latency.gpus import GpuSpec
from simulator.latency.shape import ModelShape

# What libraries and kernels hold beside PyTorch's allocations: 0.33 GiB in the start-up log of vLLM on an RTX 5090
# (vllm-project/vllm, issue 14452); and the buffers of collectives when there is more than one rank (NCCL: 342 MB
# for two GPUs, 392 MB for eight, measured).
_LIBRARY_BYTES = int(0.33 * 2**30)
_COLLECTIVE_BYTES = 392 * 2**20
# Sequences that get a token in the largest step, vLLM's default of max_num_seqs.
_SAMPLED_ROWS = 256
# Alive at once, for each logit, when tokens are drawn from the likeliest ones: a 32-bit copy, its values sorted, 64-bit
# indices of the sorting, probabilities, their running sum, the kept logits, and a mask.
_SAMPLING_BYTES = 4 + 4 + 8 + 4 + 4 + 4 + 1


def workspace_bytes(shape: ModelShape, parallel: ParallelConfig, max_batch_tokens: int) -> int:
    """Bytes beside weights and KV on the fullest rank while a step of ``max_batch_tokens`` tokens runs.

    The residual stream, its copy and its norm, queries, keys and values, and both halves of the MLP's inner columns are
    alive at once; then the logits of the sampled rows, whole on every rank, with what sampling makes of them.
    """
    heads = shape.num_heads // parallel.tp
    # Latent attention computes prompts with keys and values of every head.
    kv_heads = heads if shape.latent is not None else shape.kv_heads_per_rank(parallel)
    columns = 3 * shape.hidden + (heads + 2 * kv_heads) * shape.head_dim
    inner = shape.intermediate
    if shape.num_experts:
        inner = max(shape.expert_intermediate * shape.experts_per_token + shape.shared_intermediate, shape.hidden)
    columns += 2 * inner // parallel.tp
    activations = max_batch_tokens * columns * shape.dtype_bytes
    logits = min(_SAMPLED_ROWS, max_batch_tokens) * shape.vocab * (shape.dtype_bytes + _SAMPLING_BYTES)
    return _LIBRARY_BYTES + (_COLLECTIVE_BYTES if parallel.num_ranks > 1 else 0) + max(activations, logits)


def kv_config(
    shape: ModelShape,
    gpu: GpuSpec,
    parallel: ParallelConfig,
    *,
    block_size: int = 16,
    memory_utilisation: float = 0.9,
    max_batch_tokens: int = 2048,
) -> KvConfig | None:
    """KV memory of an instance of shape ``parallel``: what its fullest rank has left.

    ``memory_utilisation`` is the share of a GPU's memory that weights, workspace and KV may take. The CUDA context and
    captured graphs are in the rest, as in vLLM until 0.21, which budgets graphs since (``CUDA graph memory profiling is
    enabled (default since v0.21.0)``, its log). None if weights and workspace leave no room for a block.

    Raises ConfigError if the model cannot be split so.
    """
    free = gpu.memory_bytes * memory_utilisation - shape.weight_bytes(parallel)
    free -= workspace_bytes(shape, parallel, max_batch_tokens)
    num_blocks = int(free // (shape.kv_bytes_per_token(parallel) * block_size))
    return KvConfig(num_blocks, block_size) if num_blocks > 0 else None


def kv_of_bytes(shape: ModelShape, parallel: ParallelConfig, num_bytes: int, block_size: int = 16) -> KvConfig:
    """KV memory of ``num_bytes`` over all ranks of an instance, counted as a launch counts ``engine.kv_memory``.

    Raises ConfigError if it holds no block.
    """
    # Where there are more shards than KV heads, several have the same one.
    block_bytes = shape.kv.bytes_per_token * max(1, parallel.tp // shape.num_kv_heads) * block_size
    if num_bytes < block_bytes:
        raise ConfigError(
            f"engine.kv_memory of {num_bytes:,} bytes holds not a single block of {block_size} tokens of {shape.name}: "
            f"give {block_bytes:,} at least, or kv_tokens"
        )
    return KvConfig(num_bytes // block_bytes, block_size)
