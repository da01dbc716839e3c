"""The analytic model's steps: three ways to ask give one answer; hardware and splits have the effect they must have."""

from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency.analytic import AnalyticModel
from simulator.latency.efficiency import Engine
from simulator.latency.explain import explain
from simulator.latency.gpus import GPUS, find_gpu
from simulator.latency.shape import LatentAttention, ModelShape

LLAMA_70B = ModelShape("llama-70b", 80, 8192, 64, 8, 128, 28672, 128256)
MIXTRAL = ModelShape(
    "mixtral", 32, 4096, 32, 8, 128, 14336, 32000,
    num_experts=8, experts_per_token=2, expert_intermediate=14336, num_moe_layers=32,
)  # fmt: skip
SHAPES = [ParallelConfig(), ParallelConfig(tp=4), ParallelConfig(pp=4), ParallelConfig(tp=8, pp=2)]


def cluster(gpu="h100-sxm", gpus_per_node=8):
    return ClusterSpec(gpu, 2, gpus_per_node, find_gpu(gpu).link_bandwidth, 50e9, nics_per_node=8)


MODEL = AnalyticModel(LLAMA_70B, cluster())
TIMES = {parallel: MODEL.step_time(parallel) for parallel in SHAPES}


def prompt(length, past=0):
    return StepShape(length, length * past + length * (length + 1) // 2, num_prefills=1)


def decode(count, context):
    return StepShape(num_decodes=count, decode_context=count * context)


def mixed(length, past, count, context):
    return StepShape(
        length, length * past + length * (length + 1) // 2, count, count * context, num_prefills=1 if length else 0
    )


work = st.tuples(
    st.integers(0, 20000), st.integers(0, 8000), st.integers(0, 9000), st.integers(1, 8000)
).filter(lambda work: work[0] + work[2] > 0)  # fmt: skip
steps = work.map(lambda work: mixed(*work)).filter(lambda step: step.num_prefill_tokens + step.num_decodes <= 8192)


@given(steps, st.sampled_from(SHAPES))
def test_table_operations_and_arrays_agree(step, parallel):
    seconds = TIMES[parallel].seconds(step)
    assert sum(one.total_seconds for one in MODEL.operations(parallel, step)) == pytest.approx(seconds)
    assert MODEL.seconds(parallel, [step, decode(1, 1)])[0] == pytest.approx(seconds)


@given(work, st.sampled_from(SHAPES), st.sampled_from([(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]))
def test_more_work_never_takes_less_time(work, parallel, more):
    """A longer prompt, one behind a longer past, a decode more, longer contexts."""
    larger = mixed(*(one + other for one, other in zip(work, more, strict=True)))
    assert TIMES[parallel].seconds(larger) >= TIMES[parallel].seconds(mixed(*work)) - 1e-12


@pytest.mark.parametrize("length", [12000, 100000])
def test_beyond_the_table_time_goes_on_in_proportion(length):
    time = TIMES[ParallelConfig(tp=4)]
    exact = MODEL.seconds(ParallelConfig(tp=4), [prompt(length)])[0]
    assert time.seconds(prompt(length)) == pytest.approx(exact, rel=0.05)


def test_a_decode_takes_at_least_reading_the_weights():
    for parallel in SHAPES:
        reading = LLAMA_70B.weight_bytes(parallel) / MODEL.gpu.memory_bandwidth
        assert reading < TIMES[parallel].seconds(decode(1, 1)) < 2.2 * reading


def test_a_long_prompt_is_bound_by_arithmetic():
    tokens = 8192
    arithmetic = 2 * LLAMA_70B.num_parameters * tokens / MODEL.gpu.flops
    assert arithmetic < TIMES[ParallelConfig()].seconds(prompt(tokens)) < 1.6 * arithmetic


@pytest.mark.parametrize("step", [prompt(2048), decode(64, 1000)], ids=["prefill", "decode"])
def test_tensor_parallelism_speeds_up_by_less_than_its_degree(step):
    times = [MODEL.step_time(ParallelConfig(tp=tp)).seconds(step) for tp in (1, 2, 4, 8)]
    for slow, fast in pairwise(times):
        assert 1.2 < slow / fast < 2


def test_a_stage_takes_its_share_of_the_layers():
    whole, stage = (MODEL.step_time(ParallelConfig(pp=pp)).seconds(prompt(2048)) for pp in (1, 4))
    assert whole / 4 <= stage < 1.02 * whole / 4


def test_handing_over_costs_more_between_nodes():
    near = MODEL.step_time(ParallelConfig(tp=4, pp=2)).handover(prompt(2048))
    far = MODEL.step_time(ParallelConfig(tp=4, pp=2), stages_share_node=False).handover(prompt(2048))
    size = 2048 * 8192 * 2
    assert size / (4 * 450e9) < near < far
    assert far == pytest.approx(size / (4 * 50e9), rel=0.3)


def test_a_slow_link_slows_the_shards_only():
    slow = AnalyticModel(LLAMA_70B, ClusterSpec("h100-sxm", 1, 8, 32e9, 50e9))
    step = prompt(2048)
    assert slow.step_time(ParallelConfig()).seconds(step) == TIMES[ParallelConfig()].seconds(step)
    assert slow.step_time(ParallelConfig(tp=4)).seconds(step) > 1.5 * TIMES[ParallelConfig(tp=4)].seconds(step)


def test_few_tokens_touch_few_experts():
    model = AnalyticModel(MIXTRAL, cluster())
    time = model.step_time(ParallelConfig())
    everything = MIXTRAL.weight_bytes() / model.gpu.memory_bandwidth
    assert time.seconds(decode(1, 1)) < 0.6 * everything
    assert time.seconds(decode(64, 1)) > everything


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_of_the_table_has_step_times(gpu):
    model = AnalyticModel(LLAMA_70B, cluster(gpu.name))
    assert (
        0
        < model.step_time(ParallelConfig(tp=8)).seconds(decode(8, 100))
        < model.seconds(ParallelConfig(), [prompt(512)])[0]
    )
    assert gpu.name in model.source


def test_an_engine_adds_its_host():
    graphs = AnalyticModel(LLAMA_70B, cluster(), engine=Engine())
    eager = AnalyticModel(LLAMA_70B, cluster(), engine=Engine(step=0.002, host_decode=0.001, host_prefill=0.0005))
    parallel = ParallelConfig(tp=8)
    assert eager.step_time(parallel).seconds(decode(1, 1)) == pytest.approx(0.002 + 80 * 0.001)
    long = prompt(8192)
    assert eager.step_time(parallel).seconds(long) == pytest.approx(0.002 + graphs.step_time(parallel).seconds(long))


def test_an_unknown_engine_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown engine 'trt'.*Known: vllm, distserve"):
        AnalyticModel(LLAMA_70B, cluster(), engine="trt")


def test_shards_share_a_node():
    with pytest.raises(ConfigError, match="tp 8 does not fit a node of 4 GPUs"):
        AnalyticModel(LLAMA_70B, cluster(gpus_per_node=4)).step_time(ParallelConfig(tp=8))


@pytest.mark.parametrize("step", [mixed(512, 1000, 16, 700), decode(64, 1000)], ids=["mixed", "decode"])
def test_an_explanation_shows_all_of_the_time(step):
    console = Console(width=200, file=StringIO())
    parallel = ParallelConfig(tp=4)
    explain(MODEL, parallel, [step], console)
    text = console.file.getvalue()
    assert f"{TIMES[parallel].seconds(step) * 1e3:.2f} ms" in text
    assert "all-reduce" in text
    assert MODEL.source in text


def test_a_faster_host_hastens_the_engine_and_not_the_kernels():
    engine = Engine(step=0.002, sequence=1e-4, layer=1e-4)
    slow, fast = (AnalyticModel(LLAMA_70B, cluster(), engine=one) for one in (engine, engine.on_host(2)))
    step = decode(16, 1000)
    saved = slow.step_time(ParallelConfig(tp=8)).seconds(step) - fast.step_time(ParallelConfig(tp=8)).seconds(step)
    assert saved == pytest.approx((0.002 + 16 * 1e-4 + 80 * 1e-4) / 2)


def test_an_engine_may_lose_bandwidth_in_huge_all_reduces_only():
    plain, huge = (AnalyticModel(LLAMA_70B, cluster(), engine=Engine(link_huge=link)) for link in (0.0, 2.0))
    parallel = ParallelConfig(tp=4)
    below, above = prompt(64_000_000 // (2 * 8192)), prompt(8192)
    assert huge.seconds(parallel, [below])[0] == plain.seconds(parallel, [below])[0]
    lost = huge.seconds(parallel, [above])[0] - plain.seconds(parallel, [above])[0]
    assert lost == pytest.approx(160 * 1.5 * (8192 * 2 * 8192 - 64e6) / 450e9 * 2)


LATENT = ModelShape(
    "latent", 27, 2048, 16, 1, 192, 10944, 102400, num_experts=64, experts_per_token=6, expert_intermediate=1408,
    shared_intermediate=2816, num_moe_layers=26, latent=LatentAttention(0, 512, 128, 64, 128),
)  # fmt: skip


@given(steps, st.sampled_from([ParallelConfig(), ParallelConfig(tp=4, pp=2)]))
def test_latent_attention_is_the_sum_of_its_operations(step, parallel):
    model = AnalyticModel(LATENT, cluster())
    operations = model.operations(parallel, step)
    assert sum(one.total_seconds for one in operations) == pytest.approx(model.step_time(parallel).seconds(step))
    assert {"latent projection", "query projection", "key and value projection"} <= {one.name for one in operations}


def test_latent_attention_reads_what_is_cached_once():
    """A longer context costs its cached bytes, at most at full bandwidth, and no shard is spared them."""
    model = AnalyticModel(LATENT, cluster())
    for parallel in (ParallelConfig(), ParallelConfig(tp=4)):
        time = model.step_time(parallel)
        more = time.seconds(decode(64, 8000)) - time.seconds(decode(64, 4000))
        least = 64 * 4000 * LATENT.kv_bytes_per_token() / find_gpu("h100-sxm").memory_bandwidth
        assert least < more < 2 * least


def test_many_heads_of_latent_attention_are_bound_by_arithmetic():
    """128 heads on what one token caches are 240 operations a byte: more than an A100 does while it reads one."""
    heads = replace(LATENT, num_heads=128)
    gpu = find_gpu("a100-80g-sxm")
    time = AnalyticModel(heads, cluster("a100-80g-sxm")).step_time(ParallelConfig())
    more = time.seconds(decode(64, 8000)) - time.seconds(decode(64, 4000))
    operations = 2 * 128 * (576 + 512) * 27 * 64 * 4000
    assert operations / gpu.flops < more < 2.5 * operations / gpu.flops


def test_quantised_weights_are_read_faster():
    """A lone decode is all reading: at 4 bits it takes little more than a quarter of the time for the layers."""
    parallel = ParallelConfig(tp=4)
    plain = MODEL.step_time(parallel).seconds(decode(1, 100))
    quarter = AnalyticModel(replace(LLAMA_70B, weight_bits=4), cluster()).step_time(parallel).seconds(decode(1, 100))
    assert 0.25 * plain < quarter < 0.6 * plain
    assert AnalyticModel(replace(LLAMA_70B, weight_bits=16), cluster()).step_time(parallel).seconds(
        decode(1, 100)
    ) == pytest.approx(plain)
