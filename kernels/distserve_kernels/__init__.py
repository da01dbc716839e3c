"""Numeric kernels of the serving engine: one function each, whatever the device.

Every function picks the fastest implementation that supports its arguments: Triton (`distserve_kernels.gpu`) on
CUDA tensors where triton is installed, native code on CPUs with AVX-512 BF16 (AMX where there is one), otherwise the
plain torch of `distserve_kernels.reference`, whose docstrings define what each computes. On CUDA tensors no function
waits for the device, given triton: all may be captured in a CUDA graph.

- `paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, *, scale, ...)`: causal attention of
  a flattened batch, prefill chunks and decode rows mixed, over a paged cache
- `write_kv(k, v, k_cache, v_cache, slots)`: stores keys and values
- `rope_and_write_kv(qkv, cos, sin, k_cache, v_cache, slots, num_heads, ...)`: splits a fused projection, rotates,
  stores, returns the queries
- `rms_norm(x, weight, eps)`, `add_rms_norm(x, residual, weight, eps)`, `silu_mul(gate_up)`
- `rope(x, cos, sin)`: the rotation alone
- `sort_by_expert(expert_ids, num_experts)`, `grouped_matmul(x, weights, expert_starts)`: mixtures of experts
- `philox_keys(seeds, choices, indices)`, `race_uniforms(keys, vocab_size)`, `race_draw(weights, keys)`: random
  numbers from counters, and sampling with them
- `pack_kv(pool, blocks, layers, heads)`, `unpack_kv(buffer, pool, blocks, layers, heads)`: KV of a migration to and
  from one contiguous buffer of `packed_shape(pool, num_blocks, layers, heads)`
- `copy_rows(src, dst, starts, row_bytes, num_planes, ...)`: scattered rows of bytes from one memory to another
- `PackedLinear(weight, bias)`: a linear layer whose weight is kept in the layout its kernel reads
- `FusedDecoder(shape, layers)`: a whole range of decoder layers of the Llama family in one call
- `huge_bytes(num_bytes)`: zeroed memory on huge pages; decoding reads a KV cache kept in it about 10% faster
- `native_available()`: whether this process runs the native code

The package imports nothing of the rest of the project and needs only torch.
"""

from distserve_kernels.decoder_types import DecoderLayer, DecoderShape, StepInputs
from distserve_kernels.experts import grouped_matmul, sort_by_expert
from distserve_kernels.fused_decoder import FusedDecoder
from distserve_kernels.kv_pieces import pack_kv, packed_shape, unpack_kv
from distserve_kernels.linear import PackedLinear
from distserve_kernels.native import huge_bytes
from distserve_kernels.ops import (
    add_rms_norm,
    native_available,
    paged_attention,
    rms_norm,
    rope,
    rope_and_write_kv,
    silu_mul,
    write_kv,
)
from distserve_kernels.random_numbers import philox_keys, race_draw, race_uniforms
from distserve_kernels.row_copy import copy_rows

__all__ = [
    "DecoderLayer",
    "DecoderShape",
    "FusedDecoder",
    "PackedLinear",
    "StepInputs",
    "add_rms_norm",
    "copy_rows",
    "grouped_matmul",
    "huge_bytes",
    "native_available",
    "pack_kv",
    "packed_shape",
    "paged_attention",
    "philox_keys",
    "race_draw",
    "race_uniforms",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "silu_mul",
    "sort_by_expert",
    "unpack_kv",
    "write_kv",
]
