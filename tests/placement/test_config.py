"""What a configuration means to the planner."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.lengths import Fixed, LengthDistribution, Lognormal, Normal
from distserve.cluster.profile_file import write_profile
from distserve.cluster.sizing import KvRequest, size_kv
from distserve.core.config import SLO, KvConfig, ParallelConfig, PrefillPolicy, Role
from distserve.core.errors import ConfigError
from distserve.core.profile import FORMAT, Profile, ShapeProfile, StepFit, Surface, Table
from distserve.core.topology import ClusterSpec
from distserve.demo import model_dir
from placement.config import Overrides, given_candidate, load_problem
from placement.offered import Offered
from placement.shapes import find_shapes
from simulator.latency.distserve_profile import DistServeProfile
from tests.placement.conftest import WriteConfig

NONE = Overrides()
FITS = Path(__file__).parents[2] / "../shared/data/profiles/distserve"
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0,374,44
2023-11-16 18:15:48.0,396,109
2023-11-16 18:15:51.0,879,55
"""


def test_every_section_arrives(write_config: WriteConfig) -> None:
    problem = load_problem(write_config(cluster={"nics_per_node": 2}), NONE)
    assert problem.model.name == "opt-13b"
    assert problem.model.num_heads == 40
    assert problem.slo == SLO(0.4, 0.1, 0.9)
    assert problem.rate == 2
    assert problem.cluster == ClusterSpec("a100-80g-sxm", 1, 2, 300e9, 3e9, 2)
    assert "a100-80g-sxm" in problem.latency.source


def test_mixed_instances_are_planned_with_the_policy_they_would_have(write_config: WriteConfig) -> None:
    assert load_problem(write_config(), NONE).search.policies == (PrefillPolicy.SPLITFUSE,)
    whole = load_problem(write_config(engine={"mixed_policy": "whole"}), NONE)
    assert whole.search.policies == (PrefillPolicy.WHOLE_PROMPT,)
    shapes, _ = find_shapes(whole, Offered(whole.workload))
    assert {shape.policy for shape in shapes if shape.role is Role.MIXED} == {PrefillPolicy.WHOLE_PROMPT}


def test_flags_win(write_config: WriteConfig) -> None:
    problem = load_problem(write_config(), Overrides(rate=7.5, seed=3, num_workers=1, quick=True))
    assert problem.rate == 7.5
    assert (problem.search.seed, problem.search.num_workers) == (3, 1)
    assert problem.search.num_requests < load_problem(write_config(), NONE).search.num_requests


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (256, Fixed(256)),
        ("256", Fixed(256)),
        ({"fixed": 256}, Fixed(256)),
        ("lognormal:mean=300,sigma=0.8,max=1500", Lognormal(300, 0.8, 1500)),
        ({"lognormal": {"mean": 300, "sigma": 0.8}}, Lognormal(300, 0.8)),
        ({"normal": {"mean": 1200, "std": 360, "max": 2000}}, Normal(1200, 360, 2000)),
        ({"normal": {"mean": 1200, "cv": 0.3}}, Normal(1200, 360)),
    ],
)
def test_forms_of_lengths(write_config: WriteConfig, given: Any, expected: LengthDistribution) -> None:
    spec = load_problem(write_config(workload={"prompt": given}), NONE).workload
    assert spec.prompt == expected


def test_a_cv_of_lengths_is_that_of_the_lengths(write_config: WriteConfig) -> None:
    spec = load_problem(write_config(workload={"prompt": {"lognormal": {"mean": 4000, "cv": 1}}}), NONE).workload
    assert spec.prompt is not None
    lengths = spec.prompt.draw(np.random.default_rng(0), 200_000)
    assert lengths.mean() == pytest.approx(4000, rel=0.02)
    assert lengths.std() / lengths.mean() == pytest.approx(1, rel=0.05)


def test_a_trace_brings_its_own_times_unless_a_cv_is_given(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    only_trace = {"prompt": None, "output": None, "arrivals": None, "trace": "trace.csv"}
    problem = load_problem(write_config(workload=only_trace), NONE)
    assert isinstance(problem.workload.arrivals, TraceTimes)
    assert problem.rate is None
    assert problem.workload.trace is not None
    assert problem.workload.trace.prompt_lens.tolist() == [374, 396, 879]
    poisson = load_problem(write_config(workload=only_trace | {"arrivals": {"cv": 1, "rate": 3}}), NONE)
    assert poisson.workload.arrivals == Gamma(1.0)
    assert poisson.rate == 3


def test_what_the_engine_is_limited_to_limits_the_plan(write_config: WriteConfig) -> None:
    engine = {"kv_tokens": 4096, "max_batch_size": 32, "max_batch_tokens": 1024, "max_model_len": 1000}
    limits = load_problem(write_config(engine=engine), NONE).limits
    assert (limits.kv_tokens, limits.max_batch_size, limits.max_model_len) == (4096, 32, 1000)
    assert limits.prefill_batch_tokens == limits.mixed_batch_tokens == 1024
    unsaid = load_problem(write_config(), NONE).limits
    assert unsaid.prefill_batch_tokens is None
    assert unsaid.max_batch_size > 64


def test_kv_memory_in_bytes_is_what_every_instance_has(write_config: WriteConfig) -> None:
    problem = load_problem(write_config(engine={"kv_memory": 2e9}), NONE)
    expected = KvConfig(int(2e9) // (16 * problem.model.kv.bytes_per_token))
    assert problem.kv(ParallelConfig(), 2048) == problem.kv(ParallelConfig(2), 2048) == expected
    too_much, nothing = (load_problem(write_config(engine={"kv_memory": size}), NONE) for size in (2e12, 1e6))
    assert too_much.kv(ParallelConfig(), 2048) is None
    with pytest.raises(ConfigError, match=r"not a single block.* give 13,107,200 at least"):
        nothing.kv(ParallelConfig(), 2048)


def test_on_cpus_an_instance_is_planned_as_it_would_be_started(write_config: WriteConfig, tmp_path: Path) -> None:
    problem = load_problem(write_config(model=str(model_dir()), cluster={"gpu": "cpu"}), NONE)
    assert problem.model.dtype_bytes == 4, "the engine's default, not the model's bfloat16"
    started = size_kv(
        KvRequest(),
        weight_bytes=problem.model.weight_bytes(),
        token_bytes=problem.model.kv.bytes_per_token,
        max_model_len=2048,
        num_instances=2,
        num_ranks=2,
        free=64 * 2**30,
    )
    assert problem.kv(ParallelConfig(), 2048) == started


def test_a_profile_of_another_data_type_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    fit = StepFit(Surface((1, 8), (10, 100), ((0.01, 0.01), (0.01, 0.01))), Table((1, 64), (0.01, 0.01)), 0, 0, 0, 0, 0)
    shapes = (ShapeProfile(ParallelConfig(), fit),)
    profile = Profile(FORMAT, "", {"cores": 2}, "model", "", "float32", 1, 16, 2048, {}, shapes)
    write_profile(profile, tmp_path / "p.json")
    cluster = {"gpu": "cpu", "profile": "p.json"}
    assert "float32" in load_problem(write_config(cluster=cluster), NONE).latency.source
    with pytest.raises(ConfigError, match=r"profile of model is in float32.*engine: \{dtype: float32\}"):
        load_problem(write_config(cluster=cluster, engine={"dtype": "bfloat16"}), NONE)


def test_the_engine_s_dtype_sets_the_weights_size(write_config: WriteConfig) -> None:
    half, full = (load_problem(write_config(engine={"dtype": dtype}), NONE).model for dtype in ("bfloat16", "float32"))
    assert full.weight_bytes() == 2 * half.weight_bytes()


def test_pools_in_the_file_become_a_rival(write_config: WriteConfig) -> None:
    path = write_config(placement={"prefill": {"instances": 2, "tp": 1}, "decode": {"instances": 1, "tp": 2}})
    rival = given_candidate(path, load_problem(path, NONE))
    assert rival is not None
    assert [(shape.role, shape.parallel, count) for shape, count in rival.pools] == [
        (Role.PREFILL, ParallelConfig(1, 1), 2),
        (Role.DECODE, ParallelConfig(2, 1), 1),
    ]
    limits = {"kv_tokens": 9000, "max_batch_size": 48, "max_batch_tokens": 320}
    path = write_config(placement={"mixed": {"instances": 2} | limits})
    problem = load_problem(path, NONE)
    rival = given_candidate(path, problem)
    assert rival is not None
    spec = rival.pools[0][0].spec(problem, "mixed-0")
    assert spec.kv.num_tokens >= 9000 > spec.kv.num_tokens - spec.kv.block_size
    assert (spec.scheduler.max_batch_size, spec.scheduler.max_batch_tokens) == (48, 320)
    auto = write_config(placement="auto")
    assert given_candidate(auto, load_problem(auto, NONE)) is None


@pytest.mark.skipif(not FITS.exists(), reason="DistServe's fits are not here")
def test_distserve_s_fits_are_a_source(write_config: WriteConfig) -> None:
    fits = FITS / "profiler-a100-80g.distserve.json"
    path = write_config(cluster={"latency": "distserve-a100", "profile": str(fits)})
    assert isinstance(load_problem(path, NONE).latency, DistServeProfile)
    elsewhere = write_config(cluster={"latency": "distserve-a100", "profile": str(fits), "gpu": "l4"})
    with pytest.raises(ConfigError, match="a100-80g-sxm"):
        load_problem(elsewhere, NONE)


def test_a_step_s_tokens_alone_bound_the_sequences_too(write_config: WriteConfig) -> None:
    assert load_problem(write_config(engine={"max_batch_tokens": 128}), NONE).limits.max_batch_size == 128


def test_a_rival_of_uneven_stages_is_told_why(write_config: WriteConfig) -> None:
    path = write_config(placement={"prefill": {"instances": 1, "pp": 3}, "decode": {"instances": 1}})
    with pytest.raises(ConfigError, match="40 layers are planned in equal stages"):
        given_candidate(path, load_problem(path, NONE))
