"""The torch form of counter-based random numbers equals the NumPy form that the sampler uses."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from distserve.engine.sampling.philox import keys as sampler_keys
from distserve.engine.sampling.race import draw, exponentials
from distserve_kernels import philox_keys, race_draw, race_uniforms

WORDS_64 = st.integers(0, 2**64 - 1)


@given(rows=st.lists(st.tuples(WORDS_64, st.integers(0, 2**32 - 1), WORDS_64), min_size=1, max_size=8))
def test_keys_uniforms_and_draws_equal_the_samplers(rows):
    seeds, choices, indices = np.array(rows, dtype=np.uint64).T.copy()
    expected = sampler_keys(seeds, choices, indices)
    keys = philox_keys(*(torch.from_numpy(words.view(np.int64)) for words in (seeds, choices, indices)))
    assert np.array_equal(keys.numpy(), expected)
    uniforms = race_uniforms(keys, 300)
    assert torch.equal(-torch.log1p(-uniforms), exponentials(expected, 300))
    weights = torch.rand(len(rows), 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(race_draw(weights, keys), draw(weights, expected))


def test_a_token_that_is_the_only_one_is_drawn_whatever_its_number():
    """The largest words of the hash round to 1 as a uniform: its logarithm must not make the token's time infinite."""
    token, low = 7, 0xFFFFFFFF
    mixed = token ^ token >> 16
    mixed = mixed * 0x7FEB352D & low
    mixed ^= mixed >> 15
    # The hash run backwards from its largest word gives the second half of the key.
    before = (low ^ low >> 16) * pow(0x846CA68B, -1, 2**32) & low
    keys = np.array([[0, before - mixed & low]], np.uint32)
    weights = torch.zeros(1, 50)
    weights[0, token] = 1.0
    assert torch.isfinite(exponentials(keys, 50)).all()
    assert exponentials(keys, 50)[0].argmax() == token
    assert draw(weights, keys).tolist() == [token]
    wide = torch.from_numpy(keys.astype(np.int64))
    assert race_draw(weights, wide).tolist() == [token]
    assert torch.equal(-torch.log1p(-race_uniforms(wide, 50)), exponentials(keys, 50))
