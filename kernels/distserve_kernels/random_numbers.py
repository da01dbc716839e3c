"""Counter-based random numbers for sampling: the same numbers on every device, in any batch.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns (seed, choice,
index) into a row's key; a 32-bit hash (lowbias32: Chris Wellons, "Prospecting for hash functions", 2018) turns key and
token into a uniform number; and an exponential race over the tokens draws one (the Gumbel-max trick). Keys and
uniforms are equal bit by bit on all devices; the logarithm in the race is the device's, good to its last bits.

Words of 32 bits are kept in int64, where torch has all operations on every device.
"""

import torch
from torch import Tensor

from distserve_kernels.gpu.support import has_triton

_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox_keys(seeds: Tensor, choices: Tensor, indices: Tensor) -> Tensor:
    """Two random 32-bit words [S, 2] int64 for each seed (64 bits), choice (32) and index (64), all [S] int64."""
    if seeds.is_cuda and has_triton():
        from distserve_kernels.gpu import race

        return race.philox_keys(seeds.contiguous(), choices.contiguous(), indices.contiguous())
    c0, c1, c2, c3 = indices & _LOW, indices >> 32 & _LOW, choices & _LOW, torch.zeros_like(indices)
    k0, k1 = seeds & _LOW, seeds >> 32 & _LOW
    for _ in range(_ROUNDS):
        # The products wrap to negative numbers; masking the shifted word leaves the right 32 bits.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> 32 & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack([c0, c1], dim=-1)


def race_uniforms(keys: Tensor, vocab_size: int) -> Tensor:
    """Numbers [S, V] float32 in (0, 1) for keys [S, 2], with full relative precision near 0."""
    if keys.is_cuda and has_triton():
        from distserve_kernels.gpu import race

        return race.race_uniforms(keys.contiguous(), vocab_size)
    words = torch.arange(vocab_size, device=keys.device) ^ keys[:, :1]
    words = words ^ words >> 16
    words = words * 0x7FEB352D & _LOW
    words = words ^ words >> 15
    words = words + keys[:, 1:] & _LOW
    words = words * 0x846CA68B & _LOW
    words = words ^ words >> 16
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def race_draw(weights: Tensor, keys: Tensor) -> Tensor:
    """Tokens [S] int64, each with probability proportional to its weight: weights [S, V] float32, keys [S, 2].

    Token i finishes at ``-log(1 - u_i) / w_i``; the first to finish is drawn. Weights are finite and not negative, at
    least one of a row is positive.
    """
    if weights.is_cuda and has_triton():
        from distserve_kernels.gpu import race

        return race.race_draw(weights if weights.stride(1) == 1 else weights.contiguous(), keys.contiguous())
    finish = race_uniforms(keys, weights.shape[1]).neg_().log1p_().neg_()
    return (weights / finish).argmax(dim=-1)
