"""The device's sampler draws what the CPU's does, row by row, step after step."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from distserve.core.events import NOT_FINITE
from distserve.engine.device.backend import HostBackend
from distserve.engine.device.penalties import PenaltyRow, make_row
from distserve.engine.device.sampler import DeviceRow, DeviceSampler
from distserve.engine.device.truncation import sorted_thresholds
from distserve.engine.sampling import Sampler, SamplingRow, token_logprobs
from distserve.engine.sampling.logprobs import entries
from distserve.engine.sampling.penalties import has_penalties
from distserve.engine.sampling.truncation import thresholds
from tests.engine.test_sampling import VOCAB, row, rows

upload = HostBackend().upload


def penalties_of(batch: Sequence[SamplingRow]) -> list[PenaltyRow | None]:
    return [make_row(row.prompt, row.output, VOCAB, upload) if has_penalties(row.params) else None for row in batch]


def device_sampler(batch: Sequence[SamplingRow], states: Sequence[PenaltyRow | None]) -> DeviceSampler:
    made = [DeviceRow(r.params, r.choice, r.index, state) for r, state in zip(batch, states, strict=True)]
    return DeviceSampler(made, VOCAB, upload)


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=6), seed=st.integers(0, 10_000), kept=st.integers(1, 6))
def test_draws_what_the_cpu_draws_through_changes_of_the_batch(batch, seed, kept):
    rng = np.random.default_rng(seed)
    states = penalties_of(batch)
    for size in (len(batch), min(kept, len(batch))):
        # The rows that stay are taken over by another batch, in another order, with what the device knows of them.
        batch, states = batch[:size][::-1], states[:size][::-1]
        ours, cpu = device_sampler(batch, states), Sampler(batch, VOCAB)
        for _ in range(3):
            logits = torch.from_numpy((rng.standard_normal((size, VOCAB)) * 3).astype(np.float32))
            before = logits.clone()
            drawn = ours(logits).tokens
            assert torch.equal(logits, before)
            assert drawn.tolist() == cpu(logits).tokens.tolist()
            batch = [
                SamplingRow(r.params, r.choice, r.prompt, np.append(r.output, token))
                for r, token in zip(batch, drawn.tolist(), strict=True)
            ]


def test_rows_that_are_not_finite_are_told_and_leave_the_others_alone():
    params = [{"temperature": 1.0, "seed": 3}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 4, "seed": 4}]
    batch = [row(logprobs=2, frequency_penalty=0.1, **p) for p in params for _ in range(2)]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = Sampler(batch, VOCAB)(logits).tokens
    damaged = logits.clone()
    damaged[1, 3], damaged[3, 0], damaged[5] = torch.nan, torch.inf, -torch.inf
    drawn = device_sampler(batch, penalties_of(batch))(damaged).tokens
    assert drawn.tolist() == [expected[0], NOT_FINITE, expected[2], NOT_FINITE, expected[4], NOT_FINITE]
    plain = [row(temperature=0.0)] * 6
    assert (device_sampler(plain, [None] * 6)(damaged).tokens == NOT_FINITE).tolist() == [False, True] * 3


def test_log_probabilities_of_the_rows_that_want_them():
    wanted = [None, 0, 3, None, 1]
    batch = [row(temperature=0.7, seed=i, logprobs=number) for i, number in enumerate(wanted)]
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    sampler = device_sampler(batch, [None] * 5)
    draw = sampler(logits)
    assert sampler.scored_rows == [1, 2, 4]
    assert draw.scores is not None
    found = entries(draw.scores, sampler.num_top)
    assert found == token_logprobs(logits[[1, 2, 4]], draw.tokens[[1, 2, 4]], [0, 3, 1])
    assert [len(entry.top) for entry in found] == [0, 3, 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.001, 1.0, 6.0]),
    ties=st.booleans(),
    cuts=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 200, 1999, 2000, 5000]),
            st.sampled_from([1.0, 0.999, 0.9, 0.1]),
            st.sampled_from([0.0, 0.01, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_sorting_cuts_where_the_histogram_does(seed, spread, ties, cuts):
    logits = torch.randn(len(cuts), 2000, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = (logits * 4).round() / 4
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*cuts, strict=True))
    ours = sorted_thresholds(logits, top_k, top_p, min_p)
    kept, expected = logits >= ours[:, None], logits >= thresholds(logits, top_k, top_p, min_p)[:, None]
    # Sums in another order: the border may lie one token on, where it is decided by the last bit.
    weights = logits.softmax(-1)
    assert_allclose((weights * kept).sum(-1), (weights * expected).sum(-1), atol=2e-3 if spread > 1 else 1e-2)
    exact = top_p == 1
    assert torch.equal(kept[exact], expected[exact])


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, -5])
def test_seeds_of_64_bits(seed):
    batch = [row(temperature=1.0, seed=seed, choice=choice) for choice in range(3)]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    assert torch.equal(device_sampler(batch, [None] * 3)(logits).tokens, Sampler(batch, VOCAB)(logits).tokens)
