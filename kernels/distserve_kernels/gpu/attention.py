"""Causal attention of any batch over a paged cache: decode rows by one kernel, prompts by another."""

import torch
from torch import Tensor

from distserve_kernels.gpu.decode_attention import decode_attention
from distserve_kernels.gpu.prefill_attention import prefill_attention


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention`, with two more promises about the batch.

    Every sequence has at least one query (so as many queries as sequences means one each), and a sequence of context
    length 0 with one query, as padding of a captured batch has, yields zeros and reads no cache.

    Which kernel a sequence needs is decided on the device: both are launched when the batch may need both, and each
    leaves the other's sequences alone at the cost of a few idle programs.
    """
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if q.stride(-1) != 1:
        q = q.contiguous()
    tables, starts, lens = block_tables.int(), query_starts.int().contiguous(), context_lens.int().contiguous()
    if tables.stride(-1) != 1:
        tables = tables.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    arguments = (q, k_cache, v_cache, tables, starts, lens)
    num_tokens, num_sequences = q.shape[0], lens.shape[0]
    if num_sequences == 0:
        return result
    if num_tokens > num_sequences:
        prefill_attention(
            *arguments,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            out=result,
            skip_single=num_sequences > 1,
        )
    if num_tokens == num_sequences or num_sequences > 1:
        decode_attention(
            *arguments,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            out=result,
        )
    return result
