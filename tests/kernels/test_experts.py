"""Sorting assignments by expert, and the experts' products."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from distserve_kernels import grouped_matmul, sort_by_expert


@given(ids=st.lists(st.integers(0, 6), max_size=40))
def test_assignments_come_together_in_their_order(ids):
    order, starts = sort_by_expert(torch.tensor(ids, dtype=torch.int64), 7)
    assert starts.tolist() == [sum(i < expert for i in ids) for expert in range(8)]
    assert order.tolist() == sorted(range(len(ids)), key=lambda i: (ids[i], i))


def test_each_row_meets_its_experts_weight():
    weights = torch.arange(3.0)[:, None, None].expand(3, 2, 4)
    products = grouped_matmul(torch.ones(5, 4), weights, torch.tensor([0, 2, 2, 5]))
    assert products.tolist() == [[0.0, 0.0]] * 2 + [[8.0, 8.0]] * 3
