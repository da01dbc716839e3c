"""Drawing a token by an exponential race, whose outcome small changes of the weights rarely change.

Token i finishes at time ``E_i / w_i`` with independent exponential ``E_i``; the first to finish is token i with
probability ``w_i / sum(w)`` (the Gumbel-max trick: Gumbel, 1954, in exponential form). Two computations of nearly the
same weights, such as bfloat16 ones in batches of other shapes, then draw the same token but for about the difference
of the distributions; inverse CDF, where a small shift moves all borders behind it, parts several times as often.

``E_i`` is a function of the row's key and the token: the key comes from Philox, the token is mixed in by a 32-bit
integer hash (lowbias32: Chris Wellons, "Prospecting for hash functions", 2018), half of the key before its first and
half before its second multiplication. So single probabilities below 2^-32 are not exact.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2**16
"""Numbers hashed at once: they stay in the cache from one operation to the next."""
_BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1."""


def draw(weights: Tensor, keys: NDArray[np.uint32]) -> Tensor:
    """Tokens [S] drawn with probabilities proportional to weights [S, V] float32, under keys [S, 2]."""
    num_rows, vocab_size = weights.shape
    step = max(1, _BLOCK // vocab_size)
    winners = [
        (weights[start : start + step] / exponentials(keys[start : start + step], vocab_size)).max(dim=-1).indices
        for start in range(0, num_rows, step)
    ]
    return torch.cat(winners)


def exponentials(keys: NDArray[np.uint32], vocab_size: int) -> Tensor:
    """Standard exponential numbers [S, V] float32 for keys [S, 2], positive and finite."""
    words = np.arange(vocab_size, dtype=np.uint32) ^ keys[:, :1]
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x7FEB352D)
    words ^= words >> np.uint32(15)
    words += keys[:, 1:]
    words *= np.uint32(0x846CA68B)
    words ^= words >> np.uint32(16)
    # Uniform in (0, 1) with full relative precision near 0, where the winners are. The last words round to 1, and
    # would make a token's time infinite, even if it is the only one.
    uniforms = torch.from_numpy(words.astype(np.float32)).add_(0.5).mul_(2.0**-32).clamp_(max=_BELOW_ONE)
    return uniforms.neg_().log1p_().neg_()
