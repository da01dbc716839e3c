"""Counter-based random numbers: the same (seed, choice, index) gives the same number, wherever it is computed.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with that paper's
constants. The 64-bit seed is the key; the counter is (index low, index high, choice, 0).
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

Words = NDArray[np.uint64]
"""32-bit words, each in an unsigned 64-bit integer so that products do not overflow."""


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """The four output words of each counter under its key; all arrays broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keys(seeds: Words, choices: Words, indices: Words) -> NDArray[np.uint32]:
    """Two random 32-bit words [..., 2] for each (seed, choice, index); the arrays broadcast."""
    zero = np.zeros_like(indices)
    first, second, _, _ = philox((indices & _LOW, indices >> _32, choices, zero), (seeds & _LOW, seeds >> _32))
    return np.stack(np.broadcast_arrays(first, second), axis=-1).astype(np.uint32)
