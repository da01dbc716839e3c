"""What is measured: each case is one of our operations beside what bounds it, on the same inputs.

Shapes are those of an 8B Llama (32 layers, 32 query heads, 8 KV heads, head dim 128, bfloat16), and decode attention
also with 64 query heads, a GQA group of 8. ``tiny`` shapes rehearse the same code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from distserve_kernels import reference
from distserve_kernels.gpu import attention, gate, grouped_matmul, kv_pieces, norm, race, rotary

HEAD_DIM = 128
NUM_KV_HEADS = 8
BLOCK_SIZE = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """``amount`` is what both sides do in their own time: ``num_bytes`` of memory traffic, or multiply-adds times 2."""

    what: str
    against: str
    ours: Callable[[], object]
    ceiling: Callable[[], object]
    ours_amount: float
    ceiling_amount: float
    unit: str
    wanted: float | None
    """The least ratio that is asked for; None where none is."""
    check: Callable[[], None]
    """Raises AssertionError if ours computes something else."""


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    num_layers: int = 32
    pack_tokens: int = 2048
    decode: tuple[tuple[int, int, int], ...] = ((64, 4096, 64), (64, 2048, 32), (16, 2048, 32), (1, 32768, 32))
    """(sequences, context, query heads)."""
    prefill: tuple[tuple[int, int], ...] = ((1, 4096), (4, 2048), (1, 16384))
    """(sequences, prompt tokens each)."""
    rows: int = 4096
    hidden_size: int = 4096
    intermediate_size: int = 14336
    experts: tuple[tuple[int, int], ...] = ((8, 4096), (8, 16))
    """(experts, assignments)."""
    vocab_size: int = 128256
    sampled_rows: int = 64


TINY = Sizes(
    num_layers=2,
    pack_tokens=32,
    decode=((2, 40, 64),),
    prefill=((2, 24),),
    rows=3,
    hidden_size=64,
    intermediate_size=96,
    experts=((3, 8),),
    vocab_size=300,
    sampled_rows=2,
)


def all_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The cases in the table's order; each is built when the one before is done, so their memory does not add up."""
    yield from pack_cases(sizes, device)
    for num_sequences, context, num_heads in sizes.decode:
        yield decode_case(num_sequences, context, num_heads, device)
    for num_sequences, num_tokens in sizes.prefill:
        yield prefill_case(num_sequences, num_tokens, device)
    yield from row_cases(sizes, device)
    for num_experts, num_rows in sizes.experts:
        yield expert_case(num_experts, num_rows, sizes, device)
    yield draw_case(sizes, device)


def device_copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes ``num_bytes`` in all: half of it from here to there."""
    source, target = torch.zeros(2, max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    return lambda: target.copy_(source)


def _memory_case(
    what: str,
    ours: Callable[[], object],
    num_bytes: int,
    wanted: float | None,
    check: Callable[[], None],
    device: torch.device,
) -> Case:
    copy = device_copy(num_bytes, device)
    return Case(what, "device copy", ours, copy, num_bytes, num_bytes, "B/s", wanted, check)


def _close(actual: Tensor, expected: Tensor, tolerance: float = 2e-2) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def pack_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Packing and unpacking blocks at random places, of all heads and of half of them."""
    num_blocks = sizes.pack_tokens // BLOCK_SIZE
    shape = (sizes.num_layers, 2, 2 * num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    pool = torch.randn(shape, dtype=DTYPE, device=device)
    blocks = torch.randperm(2 * num_blocks, device=device)[:num_blocks]
    layers = range(sizes.num_layers)
    for heads in (range(NUM_KV_HEADS), range(NUM_KV_HEADS // 2, NUM_KV_HEADS)):
        expected = pool[:, :, blocks][..., heads.start : heads.stop, :]
        buffer = torch.empty_like(expected).contiguous()
        target = torch.zeros_like(pool)
        name = f"{sizes.pack_tokens} tokens, {len(heads)} of {NUM_KV_HEADS} heads"

        def pack(buffer: Tensor = buffer, heads: range = heads) -> None:
            kv_pieces.pack_kv(pool, blocks, layers, heads, buffer)

        def unpack(buffer: Tensor = buffer, heads: range = heads, target: Tensor = target) -> None:
            kv_pieces.unpack_kv(buffer, target, blocks, layers, heads)

        def check(buffer: Tensor = buffer, expected: Tensor = expected, pack: Callable[[], None] = pack) -> None:
            pack()
            assert torch.equal(buffer, expected)

        def check_unpack(
            heads: range = heads,
            target: Tensor = target,
            expected: Tensor = expected,
            pack: Callable[[], None] = pack,
            unpack: Callable[[], None] = unpack,
        ) -> None:
            pack()
            unpack()
            assert torch.equal(target[:, :, blocks][..., heads.start : heads.stop, :], expected)

        num_bytes = 2 * buffer.numel() * buffer.element_size()
        yield _memory_case(f"pack KV, {name}", pack, num_bytes, 0.8, check, device)
        yield _memory_case(f"unpack KV, {name}", unpack, num_bytes, 0.8, check_unpack, device)


def _paged(num_sequences: int, context: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Caches of keys and values [N, P, K, D], and tables of blocks at random places."""
    per_sequence = -(-context // BLOCK_SIZE)
    caches = torch.randn(
        2, num_sequences * per_sequence, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device
    )
    tables = torch.randperm(num_sequences * per_sequence, device=device).int().view(num_sequences, per_sequence)
    return caches[0], caches[1], tables


def decode_case(num_sequences: int, context: int, num_heads: int, device: torch.device) -> Case:
    """One decode step's attention of one layer: every key and value is read once."""
    k_cache, v_cache, tables = _paged(num_sequences, context, device)
    q = torch.randn(num_sequences, num_heads, HEAD_DIM, dtype=DTYPE, device=device)
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
    lens = torch.full((num_sequences,), context, dtype=torch.int32, device=device)
    scale = HEAD_DIM**-0.5

    def ours() -> Tensor:
        return attention.paged_attention(q, k_cache, v_cache, tables, starts, lens, scale=scale)

    def check() -> None:
        few = min(num_sequences, 2)
        arguments = (q[:few], k_cache, v_cache, tables[:few], starts[: few + 1], lens[:few])
        _close(ours()[:few], reference.paged_attention(*arguments, scale=scale))

    num_bytes = (2 * num_sequences * context * NUM_KV_HEADS * HEAD_DIM + 2 * q.numel()) * q.element_size()
    wanted = 0.7 if (num_sequences, context, num_heads) == (64, 4096, 64) else None
    what = f"decode attention, batch {num_sequences}, context {context}, GQA {num_heads // NUM_KV_HEADS}"
    return _memory_case(what, ours, num_bytes, wanted, check, device)


def prefill_case(num_sequences: int, num_tokens: int, device: torch.device) -> Case:
    """Prompts from their first token, against torch's flash attention on the same numbers, contiguous."""
    num_heads = 32
    k_cache, v_cache, tables = _paged(num_sequences, num_tokens, device)
    q = torch.randn(num_sequences * num_tokens, num_heads, HEAD_DIM, dtype=DTYPE, device=device)
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * num_tokens
    lens = torch.full((num_sequences,), num_tokens, dtype=torch.int32, device=device)
    whole = (num_sequences, num_tokens, -1, HEAD_DIM)
    k, v = (
        cache[tables.long()].flatten(1, 2)[:, :num_tokens].transpose(1, 2).contiguous() for cache in (k_cache, v_cache)
    )
    queries = q.view(whole).transpose(1, 2).contiguous()

    def ours() -> Tensor:
        return attention.paged_attention(q, k_cache, v_cache, tables, starts, lens, scale=HEAD_DIM**-0.5)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True)

    def check() -> None:
        _close(ours().view(whole), flash().transpose(1, 2))

    # Two products over the half of all pairs that causality leaves.
    operations = 2 * num_sequences * num_heads * HEAD_DIM * num_tokens * (num_tokens + 1)
    what = f"prefill attention, {num_sequences} x {num_tokens} tokens, GQA {num_heads // NUM_KV_HEADS}"
    return Case(what, "torch flash SDPA", ours, flash, operations, operations, "FLOP/s", 0.7, check)


def row_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The operations between matrix products, bound by memory."""
    shape = (sizes.rows, sizes.hidden_size)
    x, residual = torch.randn(2, *shape, dtype=DTYPE, device=device)
    weight = torch.randn(sizes.hidden_size, dtype=DTYPE, device=device)
    size = x.element_size()

    def check_norm() -> None:
        before = residual.clone()
        _close(norm.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, before, weight, 1e-5))

    def normed() -> Tensor:
        return norm.add_rms_norm(x, residual, weight, 1e-5)

    yield _memory_case(f"add and RMS norm, {shape}", normed, 4 * x.numel() * size, None, check_norm, device)

    gate_up = torch.randn(sizes.rows, 2 * sizes.intermediate_size, dtype=DTYPE, device=device)
    num_bytes = 3 * sizes.rows * sizes.intermediate_size * size
    yield _memory_case(
        f"SiLU-multiply, {tuple(gate_up.shape)}",
        lambda: gate.silu_mul(gate_up),
        num_bytes,
        None,
        lambda: _close(gate.silu_mul(gate_up), reference.silu_mul(gate_up)),
        device,
    )

    num_heads = 32
    qkv = torch.randn(sizes.rows, (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM, dtype=DTYPE, device=device)
    angles = torch.randn(sizes.rows, HEAD_DIM, device=device)
    k_cache, v_cache, _ = _paged(1, sizes.rows, device)
    slots = torch.randperm(k_cache.shape[0] * BLOCK_SIZE, device=device)[: sizes.rows]

    cos, sin = angles.cos(), angles.sin()

    def rotate() -> Tensor:
        return rotary.rope_and_write_kv(qkv, cos, sin, k_cache, v_cache, slots, num_heads)

    def check_rotation() -> None:
        queries = qkv[:, : num_heads * HEAD_DIM].view(sizes.rows, num_heads, HEAD_DIM)
        _close(rotate(), reference.rope(queries, cos, sin))

    num_bytes = 2 * qkv.numel() * size + 2 * angles.numel() * 4
    what = f"rotary embedding and KV write, {sizes.rows} tokens"
    yield _memory_case(what, rotate, num_bytes, None, check_rotation, device)


def expert_case(num_experts: int, num_rows: int, sizes: Sizes, device: torch.device) -> Case:
    """A mixture's product with ragged experts, against one dense product of as many rows.

    With few rows per expert, where reading the weights is the bound, against a copy that moves as many bytes.
    """
    weights = torch.randn(num_experts, sizes.intermediate_size, sizes.hidden_size, dtype=DTYPE, device=device) * 0.02
    x = torch.randn(num_rows, sizes.hidden_size, dtype=DTYPE, device=device)
    shares = torch.rand(num_experts, device=device).cumsum(0)
    ends = (shares / shares[-1] * num_rows).round().int()
    starts = torch.cat([torch.zeros_like(ends[:1]), ends])

    def ours() -> Tensor:
        return grouped_matmul.grouped_matmul(x, weights, starts)

    def check() -> None:
        expert = int((starts <= 0).sum()) - 1
        rows = slice(0, int(starts[expert + 1]))
        _close(ours()[rows], x[rows] @ weights[expert].T)

    what = f"grouped matmul, {num_experts} experts, {num_rows} rows"
    if num_rows // num_experts < 64:
        return _memory_case(what, ours, weights.numel() * weights.element_size(), None, check, device)
    operations = 2 * num_rows * sizes.hidden_size * sizes.intermediate_size
    return Case(
        what, "torch dense matmul", ours, lambda: x @ weights[0].T, operations, operations, "FLOP/s", None, check
    )


def draw_case(sizes: Sizes, device: torch.device) -> Case:
    """Drawing a token per row: every weight is read once."""
    weights = torch.rand(sizes.sampled_rows, sizes.vocab_size, device=device)
    rows = torch.arange(sizes.sampled_rows, device=device)
    keys = race.philox_keys(rows, rows, rows)

    def ours() -> Tensor:
        return race.race_draw(weights, keys)

    def check() -> None:
        finish = -torch.log1p(-race.race_uniforms(keys, sizes.vocab_size).double())
        assert torch.equal(ours(), (weights.double() / finish).argmax(-1))

    what = f"draw a token, {sizes.sampled_rows} rows of {sizes.vocab_size}"
    return _memory_case(what, ours, weights.numel() * 4, None, check, device)
