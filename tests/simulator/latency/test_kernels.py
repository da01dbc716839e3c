"""Kernels' formulas at their limits, where the data sheet says what they must give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.latency import kernels
from simulator.latency.efficiency import kernels_of
from simulator.latency.gpus import GPUS, find_gpu

H100 = find_gpu("h100-sxm")
EFFICIENCY = kernels_of("h100")
SIZES = st.sampled_from([256, 1024, 4096, 5120, 14336])


def gemm_seconds(m, n, k, groups=1.0):
    return kernels.gemm(H100, EFFICIENCY, np.array([float(m)]), n, k, 2, groups).seconds[0]


def test_one_row_takes_as_long_as_reading_the_matrix():
    n, k = 65536, 16384
    reading = n * k * 2 / (H100.memory_bandwidth * EFFICIENCY.gemm_memory)
    assert reading < gemm_seconds(1, n, k) < 1.05 * reading


def test_a_large_product_runs_at_the_fitted_share_of_the_peak():
    side = 16384
    arithmetic = 2 * side**3 / (H100.flops * EFFICIENCY.gemm_compute)
    assert arithmetic < gemm_seconds(side, side, side) < 1.08 * arithmetic


@given(SIZES, SIZES)
def test_more_rows_never_take_less_time(n, k):
    seconds = kernels.gemm(H100, EFFICIENCY, np.arange(1.0, 2049.0), n, k, 2).seconds
    assert (np.diff(seconds) >= -1e-12).all()


def test_a_started_wave_costs_a_full_one():
    """132 SMs hold 12 x 11 tiles at once; a twelfth column of them costs more than its share of the work."""
    full, over = gemm_seconds(256 * 12, 128 * 11, 8192), gemm_seconds(256 * 12, 128 * 11 + 128, 8192)
    assert over > 1.02 * full * 12 / 11


def test_groups_are_as_many_products():
    assert gemm_seconds(4096, 4096, 4096, groups=8.0) == pytest.approx(8 * gemm_seconds(4096, 4096, 4096), rel=0.1)


def test_attention_is_affine_in_pairs_and_context():
    tokens = np.full(3, 512.0)
    prefill = kernels.prefill_attention(H100, EFFICIENCY, tokens, np.array([1e5, 2e5, 3e5]), 32, 8, 128, 2).seconds
    decode = kernels.decode_attention(H100, EFFICIENCY, tokens, np.array([1e5, 2e5, 3e5]), 32, 8, 128, 2).seconds
    for seconds in (prefill, decode):
        assert seconds[1] - seconds[0] == pytest.approx(seconds[2] - seconds[1])
        assert seconds[1] > seconds[0]


def test_decode_attention_of_many_reads_the_cache_at_the_fitted_bandwidth():
    context = 256 * 8192.0
    seconds = kernels.decode_attention(H100, EFFICIENCY, np.array([256.0]), np.array([context]), 32, 8, 128, 2).seconds[
        0
    ]
    reading = context * 2 * 8 * 128 * 2 / (H100.memory_bandwidth * EFFICIENCY.decode_memory)
    assert reading < seconds < 1.05 * reading


def test_a_large_all_reduce_is_bound_by_the_ring():
    size = np.array([1e9])
    seconds = kernels.all_reduce(450e9, EFFICIENCY, size, 4).seconds[0]
    assert seconds == pytest.approx(1.5e9 / (450e9 * EFFICIENCY.all_reduce_bandwidth), rel=0.01)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_kernel_beats_the_data_sheet(gpu):
    """A product of full tiles: no faster than its arithmetic and its traffic. A boosted clock may gain 10%."""
    eff = kernels_of(gpu.kernels)
    for m in (1.0, 64.0, 1024.0, 8192.0):
        cost = kernels.gemm(gpu, eff, np.array([m]), 16384, 16384, 2)
        bound = max(cost.flops[0] / gpu.flops, cost.bytes[0] / gpu.memory_bandwidth)
        assert cost.seconds[0] > bound / 1.1
