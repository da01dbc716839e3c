"""The GPU table, and the KV memory an instance has."""

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from simulator.latency.efficiency import kernels_of
from simulator.latency.gpus import GPUS, find_gpu
from simulator.latency.memory import kv_config
from simulator.latency.shape import ModelShape

OPT_13B = ModelShape(
    "opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, gated_mlp=False, tied_embeddings=True, num_positions=2050
)
OPT_66B = ModelShape(
    "opt-66b", 64, 9216, 72, 72, 128, 36864, 50272, gated_mlp=False, tied_embeddings=True, num_positions=2050
)
LLAMA_8B = ModelShape("llama-8b", 32, 4096, 32, 8, 128, 14336, 128256)


def test_every_gpu_is_found_by_its_name():
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)
    assert find_gpu("A100_80G SXM").name == "a100-80g-sxm"


@pytest.mark.parametrize(
    ("name", "near"), [("h100", "h100-pcie or h100-sxm"), ("rtx-4090", "rtx4090"), ("L40", "l40s")]
)
def test_an_unknown_gpu_suggests_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"Did you mean.*{near}"):
        find_gpu(name)


def test_a_name_like_no_other_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown GPU 'zzz'\. Known: a100-40g-pcie"):
        find_gpu("zzz")


@pytest.mark.parametrize(
    ("shape", "tp", "tokens"),
    [(OPT_13B, 1, 66144), (OPT_13B, 4, 356736), (OPT_66B, 4, 78496), (OPT_66B, 8, 212304)],
)
def test_kv_capacity_agrees_with_distserve_on_an_a100(shape, tp, tokens):
    """Its published table max_num_tokens.csv, at the 95% of memory it used."""
    kv = kv_config(shape, find_gpu("a100-80g-sxm"), ParallelConfig(tp=tp), memory_utilisation=0.95)
    assert kv is not None
    assert kv.num_tokens == pytest.approx(tokens, rel=0.03)


def test_kv_capacity_agrees_with_vllm_on_an_rtx_4090():
    """vLLM 0.19: 2,588 blocks of 16 tokens at 90% of memory, batches of 2,048 tokens."""
    kv = kv_config(LLAMA_8B, find_gpu("rtx4090"), ParallelConfig(), max_batch_tokens=2048)
    assert kv is not None
    assert kv.num_tokens == pytest.approx(41408, rel=0.05)


def test_no_kv_where_the_weights_do_not_fit():
    assert kv_config(OPT_66B, find_gpu("a100-80g-sxm"), ParallelConfig()) is None


def test_matrix_products_run_at_the_clock_that_power_allows():
    """The cards made of one chip: the more watts for an operation, the higher the clock."""
    clocks = {name: find_gpu(name).power_clock for name in ("l4", "l40s", "rtx4090")}
    assert clocks["l4"] < clocks["l40s"] < clocks["rtx4090"]
    assert find_gpu("h100-pcie").power_clock < find_gpu("h100-sxm").power_clock
    for slow, fast in (("l4", "l40s"), ("h100-pcie", "h100"), ("a100-pcie", "a100")):
        assert kernels_of(slow).gemm_compute < kernels_of(fast).gemm_compute
