"""DistServe's fits, evaluated as its simulator does."""

import json

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from simulator.latency.distserve_profile import DistServeProfile

FIT = {
    "decoding_large_small_bs_threshold": 95,
    "prefill": [18.0, 0.1, 7e-6],
    "decoding_smallbs": [20.0, 6e-4, 0.04],
    "decoding_largebs": [7.0, 5e-4, 0.16],
}


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": FIT, "2": FIT}}))
    return DistServeProfile.load(path, "opt-13b")


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_whole_prompts(profile, pp):
    lengths = [100, 700, 33]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    step = StepShape(sum(lengths), pairs, num_prefills=3)
    expected = (18.0 + 0.1 * sum(lengths) + 7e-6 * sum(length**2 for length in lengths)) / pp + pp
    assert profile.step_time(ParallelConfig(pp=pp)).seconds(step) == pytest.approx(expected / 1e3)


@pytest.mark.parametrize(
    ("batch", "base", "per_context", "per_sequence"), [(94, 20.0, 6e-4, 0.04), (95, 7.0, 5e-4, 0.16)]
)
def test_decodes_on_both_sides_of_the_threshold(profile, batch, base, per_context, per_sequence):
    step = StepShape(num_decodes=batch, decode_context=batch * 300)
    expected = (base + per_context * batch * 300 + per_sequence * batch) / 2
    assert profile.step_time(ParallelConfig(tp=2, pp=2)).seconds(step) == pytest.approx(expected / 1e3)


def test_a_mixed_step_pays_its_constant_once(profile):
    time = profile.step_time(ParallelConfig())
    prompt = StepShape(100, 5050, num_prefills=1)
    both = StepShape(100, 5050, num_decodes=10, decode_context=3000, num_prefills=1)
    assert time.seconds(both) - time.seconds(prompt) == pytest.approx((6e-4 * 3000 + 0.04 * 10) / 1e3)


def test_only_measured_degrees(profile):
    with pytest.raises(ConfigError, match="know tp 1, 2 of facebook/opt-13b, not tp 4"):
        profile.step_time(ParallelConfig(tp=4))


def test_says_where_its_figures_come_from(profile):
    assert "DistServe" in profile.source
    assert "A100" in profile.source


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match="cannot read"):
        DistServeProfile.load(path, "opt-13b")
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="not a profile"):
        DistServeProfile.load(path, "opt-13b")
    path.write_text(json.dumps({"facebook/opt-13b": {"1": FIT}}))
    with pytest.raises(ConfigError, match="no fits of opt-66b; it has opt-13b"):
        DistServeProfile.load(path, "opt-66b")
