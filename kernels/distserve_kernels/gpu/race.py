"""Random numbers from counters, and the exponential race that draws tokens with them, on the device."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["size"])
def _keys_kernel(seeds_ptr, choices_ptr, indices_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    low = tl.full([BLOCK], 0xFFFFFFFF, tl.uint64)
    seed = tl.load(seeds_ptr + at, mask=keep, other=0).to(tl.uint64)
    index = tl.load(indices_ptr + at, mask=keep, other=0).to(tl.uint64)
    c0, c1 = index & low, index >> 32
    c2 = tl.load(choices_ptr + at, mask=keep, other=0).to(tl.uint64) & low
    c3 = tl.zeros([BLOCK], tl.uint64)
    k0, k1 = seed & low, seed >> 32
    m0, m1 = tl.full([BLOCK], 0xD2511F53, tl.uint64), tl.full([BLOCK], 0xCD9E8D57, tl.uint64)
    w0, w1 = tl.full([BLOCK], 0x9E3779B9, tl.uint64), tl.full([BLOCK], 0xBB67AE85, tl.uint64)
    for _ in tl.static_range(10):
        product0, product1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & low, (product0 >> 32) ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + w0) & low, (k1 + w1) & low
    tl.store(out_ptr + 2 * at, c0.to(tl.int64), mask=keep)
    tl.store(out_ptr + 2 * at + 1, c1.to(tl.int64), mask=keep)


@triton.jit
def _uniforms(tokens, key0, key1):
    """Uniform in (0, 1) for token ids (uint32) under a row's key: lowbias32 with the key mixed in."""
    words = tokens ^ key0
    words ^= words >> 16
    words *= tl.full([1], 0x7FEB352D, tl.uint32)
    words ^= words >> 15
    words += key1
    words *= tl.full([1], 0x846CA68B, tl.uint32)
    words ^= words >> 16
    # The last words round to 1; the largest float below keeps the logarithm finite.
    return tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)


@triton.jit
def _uniforms_kernel(keys_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key0 = tl.load(keys_ptr + 2 * row).to(tl.uint32)
    key1 = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32)
    uniforms = _uniforms(tokens.to(tl.uint32), key0, key1)
    tl.store(out_ptr + row * vocab_size + tokens, uniforms, mask=tokens < vocab_size)


@triton.jit
def _race_kernel(weights_ptr, keys_ptr, best_ptr, token_ptr, stride, vocab_size, num_parts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    tokens = part * BLOCK + tl.arange(0, BLOCK)
    keep = tokens < vocab_size
    key0 = tl.load(keys_ptr + 2 * row).to(tl.uint32)
    key1 = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32)
    u = _uniforms(tokens.to(tl.uint32), key0, key1)
    # -log1p(-u) with full relative precision near 0 (Kahan): what 1 - u lost is put back by the quotient.
    rest = 1.0 - u
    plain = rest == 1.0
    finish = tl.where(plain, u, -tl.log(rest) * u / tl.where(plain, 1.0, 1.0 - rest))
    weights = tl.load(weights_ptr + row * stride + tokens, mask=keep, other=0.0)
    speed = tl.where(keep, weights / finish, -1.0)
    best, where = tl.max(speed, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + row * num_parts + part, best)
    tl.store(token_ptr + row * num_parts + part, (part * BLOCK + where).to(tl.int64))


def philox_keys(seeds: Tensor, choices: Tensor, indices: Tensor) -> Tensor:
    """`distserve_kernels.philox_keys`: all [S] int64, to [S, 2] int64."""
    out = torch.empty((*seeds.shape, 2), dtype=torch.int64, device=seeds.device)
    if seeds.numel() == 0:
        return out
    block = 128
    _keys_kernel[(triton.cdiv(seeds.numel(), block),)](seeds, choices, indices, out, seeds.numel(), BLOCK=block)
    return out


def race_uniforms(keys: Tensor, vocab_size: int) -> Tensor:
    """`distserve_kernels.race_uniforms`: keys [S, 2] int64 to [S, V] float32."""
    out = torch.empty((keys.shape[0], vocab_size), dtype=torch.float32, device=keys.device)
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(vocab_size), _BLOCK)
    _uniforms_kernel[(keys.shape[0], triton.cdiv(vocab_size, block))](keys, out, vocab_size, BLOCK=block, num_warps=8)
    return out


def race_draw(weights: Tensor, keys: Tensor) -> Tensor:
    """`distserve_kernels.race_draw`: weights [S, V] float32, keys [S, 2] int64, to tokens [S] int64."""
    num_rows, vocab_size = weights.shape
    block = min(triton.next_power_of_2(vocab_size), _BLOCK)
    num_parts = triton.cdiv(vocab_size, block)
    best = torch.empty((num_rows, num_parts), dtype=torch.float32, device=weights.device)
    tokens = torch.empty((num_rows, num_parts), dtype=torch.int64, device=weights.device)
    if num_rows:
        _race_kernel[(num_rows, num_parts)](
            weights, keys, best, tokens, weights.stride(0), vocab_size, num_parts, BLOCK=block, num_warps=8
        )
    return tokens.gather(1, best.argmax(1, keepdim=True)).squeeze(1)
