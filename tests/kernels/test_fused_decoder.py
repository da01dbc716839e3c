"""The fused decoder against the same layers computed in float64, and against itself in pieces."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distserve_kernels import DecoderLayer, DecoderShape, FusedDecoder, StepInputs

BLOCK = 16
# Of the norm of the difference to the norm of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_shape(*, num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 32) -> DecoderShape:
    return DecoderShape(
        hidden_size=96,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=160,
        norm_eps=1e-5,
        scale=head_dim**-0.5,
    )


def make_layers(shape: DecoderShape, count: int, dtype: torch.dtype, *, extras: bool, window: int | None = None):
    generator = torch.Generator().manual_seed(5)
    hidden, q_size, inner = shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size
    qkv_size = q_size + 2 * shape.num_kv_heads * shape.head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    def vector(size: int, around: float) -> Tensor:
        return (torch.randn(size, generator=generator) * 0.1 + around).to(dtype)

    return [
        DecoderLayer(
            input_norm=vector(hidden, 1.0),
            qkv=matrix(qkv_size, hidden),
            o_proj=matrix(hidden, q_size),
            post_attention_norm=vector(hidden, 1.0),
            gate_up=matrix(2 * inner, hidden),
            down=matrix(hidden, inner),
            qkv_bias=vector(qkv_size, 0.0) if extras else None,
            o_bias=vector(hidden, 0.0) if extras else None,
            q_norm=vector(shape.head_dim, 1.0) if extras else None,
            k_norm=vector(shape.head_dim, 1.0) if extras else None,
            sliding_window=window if index % 2 else None,
        )
        for index in range(count)
    ]


def to_dtype(layer: DecoderLayer, dtype: torch.dtype) -> DecoderLayer:
    tensors = {name: value.to(dtype) for name, value in vars(layer).items() if isinstance(value, Tensor)}
    return replace(layer, **tensors)


def make_caches(shape: DecoderShape, count: int, blocks: int, dtype: torch.dtype) -> list[Tensor]:
    size = (blocks, BLOCK, shape.num_kv_heads, shape.head_dim)
    return [torch.full(size, float("nan"), dtype=dtype) for _ in range(count)]


def make_step(shape: DecoderShape, spans: list[tuple[int, int]]) -> StepInputs:
    """One sequence per (first position, end position), 20 blocks each."""
    positions = torch.cat([torch.arange(first, end) for first, end in spans])
    owners = torch.cat([torch.full((end - first,), b) for b, (first, end) in enumerate(spans)])
    tables = torch.arange(len(spans) * 20, dtype=torch.int32).view(20, len(spans)).T.contiguous()
    slots = tables[owners, positions // BLOCK].long() * BLOCK + positions % BLOCK
    frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    angles = positions[:, None] * frequencies
    return StepInputs(
        cos=torch.cat([angles, angles], dim=-1).cos().float(),
        sin=torch.cat([angles, angles], dim=-1).sin().float(),
        slots=slots,
        block_tables=tables,
        query_starts=torch.tensor([0, *torch.tensor([e - f for f, e in spans]).cumsum(0).tolist()]).int(),
        context_lens=torch.tensor([end for _, end in spans]).int(),
    )


def run(decoder: FusedDecoder, steps: list[StepInputs], inputs: list[Tensor], **caches: list[Tensor]) -> list[Tensor]:
    return [decoder(x.clone(), step, **caches) for step, x in zip(steps, inputs, strict=True)]


@settings(max_examples=15, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=4),
    heads=st.sampled_from([(6, 2), (4, 4), (3, 1)]),
    head_dim=st.sampled_from([16, 32, 64]),
    extras=st.booleans(),
    window=st.sampled_from([None, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_prompts_then_mixed_steps_equal_float64(spans, heads, head_dim, extras, window, dtype):
    shape = make_shape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    layers = make_layers(shape, 3, dtype, extras=extras, window=window)
    steps = [
        make_step(shape, [(0, prompt) for prompt, _ in spans]),
        make_step(shape, [(prompt, prompt + more) for prompt, more in spans]),
        make_step(shape, [(prompt + more, prompt + more + 1) for prompt, more in spans]),
    ]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(step.slots.numel(), 96, generator=generator).to(dtype) for step in steps]

    def outputs(to: torch.dtype) -> list[Tensor]:
        decoder = FusedDecoder(shape, (to_dtype(layer, to) for layer in layers))
        caches = [make_caches(shape, 3, 20 * len(spans), to) for _ in range(2)]
        return run(decoder, steps, [x.to(to) for x in inputs], k_caches=caches[0], v_caches=caches[1])

    for actual, exact in zip(outputs(dtype), outputs(torch.float64), strict=True):
        assert (actual.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40, 300])
def test_ranges_of_layers_give_the_same_bits(dtype, num_tokens):
    shape = make_shape()
    decoder = FusedDecoder(shape, make_layers(shape, 4, dtype, extras=True))
    step = make_step(shape, [(0, num_tokens)])
    x = torch.randn(num_tokens, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = decoder(x.clone(), step, make_caches(shape, 4, 20, dtype), make_caches(shape, 4, 20, dtype))
    k_caches, v_caches = make_caches(shape, 4, 20, dtype), make_caches(shape, 4, 20, dtype)
    pieces = x.clone()
    for first, last in [(0, 1), (1, 3), (3, 4)]:
        pieces = decoder(pieces, step, k_caches, v_caches, first=first, last=last)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_reduce_sees_both_halves_of_every_layer(dtype):
    shape = make_shape()
    layers = make_layers(shape, 2, dtype, extras=False)
    seen = []
    split = FusedDecoder(shape, layers, all_reduce=lambda partial: seen.append(partial.clone()))
    step = make_step(shape, [(0, 30)])
    x = torch.randn(30, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    caches = [make_caches(shape, 2, 20, dtype) for _ in range(4)]
    alone = FusedDecoder(shape, layers)(x.clone(), step, caches[0], caches[1])
    reduced = split(x.clone(), step, caches[2], caches[3])
    assert len(seen) == 4
    for result in (reduced, x + sum(seen)):
        assert (result - alone).norm() / alone.norm() < TOLERANCE[dtype]


def test_threads_give_the_same_bits():
    shape = make_shape(num_heads=12, num_kv_heads=4)
    decoder = FusedDecoder(shape, make_layers(shape, 3, torch.bfloat16, extras=True))
    step = make_step(shape, [(0, 90), (40, 41), (5, 20), (100, 101)])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(step.slots.numel(), 96, generator=generator).bfloat16()

    def outputs(num_threads: int) -> Tensor:
        caches = [[torch.ones_like(c) for c in make_caches(shape, 3, 80, torch.bfloat16)] for _ in range(2)]
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            return decoder(x.clone(), step, *caches)
        finally:
            torch.set_num_threads(before)

    alone = outputs(1)
    for num_threads in (2, 3):
        assert torch.equal(outputs(num_threads), alone)


def test_a_cache_the_library_cannot_read_is_refused():
    shape = make_shape()
    decoder = FusedDecoder(shape, make_layers(shape, 1, torch.bfloat16, extras=False))
    if not decoder.is_native:
        pytest.skip("no native code on this machine")
    cache = [torch.zeros(4, 4, 2, 32, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="multiple of 16"):
        decoder(torch.zeros(1, 96, dtype=torch.bfloat16), make_step(shape, [(0, 1)]), cache, cache)
