"""Random numbers on the GPU: equal, bit by bit, to those the engine's sampler draws on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distserve_kernels import philox_keys, race_draw, race_uniforms
from distserve_kernels.gpu import race
from tests.kernels.gpu.checking import SEEDS, bits, examples

WORDS_64 = st.integers(-(2**63), 2**63 - 1)


@examples(20)
@given(rows=st.lists(st.tuples(WORDS_64, st.integers(0, 2**32 - 1), WORDS_64), max_size=5))
def test_keys(device, rows):
    seeds, choices, indices = torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous()
    keys = race.philox_keys(*(t.to(device) for t in (seeds, choices, indices)))
    assert torch.equal(keys.cpu(), philox_keys(seeds, choices, indices))


@examples(10)
@given(seed=SEEDS, vocab_size=st.sampled_from([1, 5, 1000, 9000]), num_rows=st.integers(0, 3))
def test_uniforms_and_draws(device, seed, vocab_size, num_rows):
    rows = torch.arange(num_rows)
    keys = philox_keys(torch.full_like(rows, seed), rows, rows)
    uniforms = race_uniforms(keys, vocab_size)
    assert torch.equal(bits(race.race_uniforms(keys.to(device), vocab_size)), bits(uniforms))
    weights = torch.rand(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    # Most tokens are cut, as by top-k.
    weights[:, 3 * vocab_size // 4 :] = 0
    drawn = race.race_draw(weights.to(device), keys.to(device)).cpu()
    exact = (weights.double() / -torch.log1p(-uniforms.double())).argmax(-1)
    assert torch.equal(drawn, exact)
    assert torch.equal(drawn, race_draw(weights, keys))


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1])
def test_the_extremes_of_the_race(device, word):
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    keys = torch.tensor([[word, word]])
    assert race.race_draw(weights.to(device), keys.to(device)).tolist() == [1]


def test_drawn_as_often_as_weighed(device):
    weights = torch.tensor([0.5, 0.25, 0.0, 0.25])
    rows = torch.arange(600)
    keys = philox_keys(torch.full_like(rows, 7), torch.zeros_like(rows), rows)
    drawn = race.race_draw(weights.expand(600, 4).contiguous().to(device), keys.to(device)).cpu()
    shares = np.bincount(drawn.numpy(), minlength=4) / 600
    assert shares[2] == 0
    np.testing.assert_allclose(shares, weights.numpy(), atol=0.06)
