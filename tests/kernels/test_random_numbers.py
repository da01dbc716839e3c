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
