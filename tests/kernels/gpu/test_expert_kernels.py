"""Grouped products of experts on the GPU against float64, empty experts and ragged sizes included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distserve_kernels import grouped_matmul, sort_by_expert
from tests.kernels.gpu.checking import DTYPES, NAN, SEEDS, assert_matches, bits, examples, random


@examples(25)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 3, 17, 40]), min_size=1, max_size=6),
    num_inputs=st.sampled_from([1, 16, 70, 130]),
    num_outputs=st.sampled_from([1, 32, 150]),
    around=st.sampled_from([(0, 0), (2, 3)]),
    transposed=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_grouped_matmul(device, counts, num_inputs, num_outputs, around, transposed, dtype, seed):
    starts = torch.tensor([around[0], *counts]).cumsum(0).int()
    num_rows = int(starts[-1]) + around[1]
    x = random(num_rows, num_inputs, dtype=dtype, seed=seed)
    weights = (random(len(counts), num_outputs, num_inputs, dtype=torch.float32, seed=seed + 1) / num_inputs**0.5).to(
        dtype
    )
    if transposed:
        weights = weights.mT.contiguous().mT
    exact = grouped_matmul(x.double(), weights.double(), starts)
    out = torch.full((num_rows, num_outputs), NAN, dtype=dtype, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distserve_kernels.experts.runs_here", lambda *_: True)
        assert grouped_matmul(x.to(device), weights.to(device), starts.to(device), out) is out
    computed = slice(around[0], int(starts[-1]))
    assert_matches(out[computed], exact[computed])
    untouched = torch.full_like(out, NAN)
    for rows in (slice(0, around[0]), slice(int(starts[-1]), None)):
        assert torch.equal(bits(out[rows]), bits(untouched[rows]))


def test_a_mixture_of_experts_in_one_piece(device):
    x = random(9, 16, dtype=torch.float32, seed=1)
    weights = random(5, 8, 16, dtype=torch.float32, seed=2)
    expert_ids = torch.tensor([[0, 3], [3, 4], [0, 4], [3, 0], [4, 3], [0, 3], [4, 0], [3, 4], [0, 4]])
    order, starts = sort_by_expert(expert_ids.to(device), 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distserve_kernels.experts.runs_here", lambda *_: True)
        products = grouped_matmul(x.to(device)[order // 2], weights.to(device), starts)
    result = torch.empty_like(products)
    result[order] = products
    expected = torch.einsum("ti,taoi->tao", x.double(), weights[expert_ids].double())
    assert_matches(result.view(9, 2, 8), expected)
