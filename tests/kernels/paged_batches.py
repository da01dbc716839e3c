"""Random batches over a paged cache in which everything that must not be read is poison."""

from dataclasses import dataclass

import torch
from torch import Tensor

UNUSED_BLOCK = 2**30


@dataclass(frozen=True)
class PagedBatch:
    """Arguments of `paged_attention`; unused cache slots are NaN and unused table entries invalid."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        """In the order of the call."""
        return self.q, self.k_cache, self.v_cache, self.block_tables, self.query_starts, self.context_lens

    def exact(self) -> "PagedBatch":
        """The same numbers in float64."""
        return PagedBatch(self.q.double(), self.k_cache.double(), self.v_cache.double(), *self.arguments()[3:])


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
    visible_window: int | None = None,
) -> PagedBatch:
    """One sequence per (tokens before this step, tokens of this step); blocks in random order.

    With ``visible_window``, what no query of the step sees is poison as well, and whole blocks of it are unmapped.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = [before + queries for before, queries in lengths]
    blocks_of = [-(-total // block_size) for total in totals]
    num_blocks = sum(blocks_of) + 2
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.full((len(lengths), max(blocks_of) + 1), UNUSED_BLOCK, dtype=torch.int32)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    for b, (before, _) in enumerate(lengths):
        first_seen = 0 if visible_window is None else max(0, before - visible_window + 1)
        for position in range(first_seen, totals[b]):
            index = position // block_size
            if tables[b, index] == UNUSED_BLOCK:
                tables[b, index] = order.pop()
            where = int(tables[b, index]), position % block_size
            k_cache[where] = torch.randn(num_kv_heads, head_dim, generator=generator).to(dtype)
            v_cache[where] = torch.randn(num_kv_heads, head_dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *torch.tensor([queries for _, queries in lengths]).cumsum(0).tolist()])
    q = torch.randn(int(starts[-1]), num_heads, head_dim, generator=generator).to(dtype)
    return PagedBatch(q, k_cache, v_cache, tables, starts.int(), torch.tensor(totals, dtype=torch.int32))
