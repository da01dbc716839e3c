"""Copies of scattered rows: exact, in every plane, and no byte beside what was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distserve_kernels import copy_rows
from distserve_kernels.gpu import row_copy
from tests.kernels.gpu.checking import examples


@examples(40)
@given(
    unit=st.sampled_from([1, 2, 3, 4, 8, 34, 64]),
    units_per_row=st.sampled_from([1, 2, 5, 130, 1100]),
    num_rows=st.integers(0, 9),
    num_planes=st.integers(0, 3),
    data=st.data(),
)
def test_rows_arrive_and_nothing_else_is_written(device, unit, units_per_row, num_rows, num_planes, data):
    row_bytes, slots = unit * units_per_row, 12
    src_stride, dst_stride = ((slots + data.draw(st.integers(0, 2))) * row_bytes for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    src = torch.randint(256, (max(num_planes, 1) * src_stride,), dtype=torch.uint8, generator=generator)
    dst = torch.randint(256, (max(num_planes, 1) * dst_stride,), dtype=torch.uint8, generator=generator)
    # Rows may begin in the middle of others, as heads within tokens do.
    shift = data.draw(st.integers(0, units_per_row - 1)) * unit
    src_starts = data.draw(st.lists(st.integers(0, slots - 2), min_size=num_rows, max_size=num_rows))
    dst_starts = data.draw(st.permutations(range(slots)))[:num_rows]
    starts = torch.tensor([[s * row_bytes + shift for s in src_starts], [s * row_bytes for s in dst_starts]])
    starts = starts.reshape(2, num_rows).long()
    expected = dst.clone()
    for plane in range(num_planes):
        for src_start, dst_start in starts.T.tolist():
            source = src[plane * src_stride + src_start :][:row_bytes]
            expected[plane * dst_stride + dst_start :][:row_bytes] = source
    by_torch = dst.clone()
    copy_rows(src, by_torch, starts, row_bytes, num_planes, src_stride, dst_stride, unit=unit)
    assert torch.equal(by_torch, expected)
    if num_rows and num_planes:
        by_kernel = dst.to(device)
        arguments = (row_bytes, num_planes, src_stride, dst_stride, unit)
        row_copy.copy_rows(src.to(device), by_kernel, starts.to(device), *arguments)
        assert torch.equal(by_kernel.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_takes_the_kernel():
    src = torch.arange(64, dtype=torch.uint8, device="cuda")
    dst = torch.zeros_like(src)
    copy_rows(src, dst, torch.tensor([[0], [32]], device="cuda"), 32, 1, 64, 64, unit=32)
    assert torch.equal(dst[32:], src[:32])
