import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from distserve.cluster.costs import make_loads, measure_pulls
from distserve.cluster.profile_command import profile as command
from distserve.cluster.profile_file import read_profile, write_profile
from distserve.core.config import KvLayout
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import ClusterCosts
from distserve.demo import model_dir


@pytest.fixture(scope="module")
def engine_profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "demo.json"
    options = ["--engine-only", "--quick", "--max-batch-size", "4", "--max-batch-tokens", "64", "--output", str(path)]
    result = CliRunner().invoke(command, [str(model_dir()), *options])
    assert result.exit_code == 0, result.output
    assert "median error of the fit" in result.output
    return path


def test_a_profile_says_what_it_was_taken_of(engine_profile):
    profile = read_profile(engine_profile)
    assert profile.dtype == "float32"
    assert profile.limits["max_batch_tokens"] == 64
    assert profile.machine["cores"]
    assert profile.cluster is None
    assert set(profile.residuals) == {"decode", "prefill", "mixed"}
    measured = next(m for m in profile.measurements if m.shape.num_decodes == 4 and not m.shape.num_prefill_tokens)
    assert profile.step_time().seconds(measured.shape) == pytest.approx(measured.median)


def test_a_profile_survives_its_file(engine_profile, tmp_path):
    costs = ClusterCosts(*(0.001 * (i + 1) for i in range(15)))
    profile = replace(read_profile(engine_profile), cluster=costs)
    write_profile(profile, tmp_path / "again.json")
    again = read_profile(tmp_path / "again.json")
    assert again == profile
    shape = StepShape(num_decodes=2, decode_context=100)
    added = again.step_time().seconds(shape) - read_profile(engine_profile).step_time().seconds(shape)
    assert added == pytest.approx(costs.step + 2 * costs.step_per_sequence)


def test_files_that_are_no_profiles_are_named(engine_profile, tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_profile(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    for text in ("{", "[]", '{"format": "distserve-profile/2"}', "\xff"):
        broken.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"broken\.json is no profile.*distserve profile"):
            read_profile(broken)
    data = json.loads(engine_profile.read_text())
    broken.write_text(json.dumps(data | {"format": "distserve-profile/0"}))
    with pytest.raises(ConfigError, match="profile anew"):
        read_profile(broken)
    data["fit"]["prefill"]["knots"].reverse()
    broken.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="rising"):
        read_profile(broken)


def test_wrong_arguments_end_with_a_sentence(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path / "no-model")])
    assert result.exit_code == 1
    assert "no-model does not exist" in result.output
    result = CliRunner().invoke(command, [str(model_dir()), "--output", str(tmp_path / "no" / "dir.json")])
    assert result.exit_code == 1
    assert "no directory" in result.output


def test_pulls_take_time_by_the_byte():
    layout = KvLayout(num_layers=4, num_blocks=8, block_size=16, num_kv_heads=2, head_dim=32, dtype="float32")
    fixed, per_byte = measure_pulls(layout, num_blocks=32, num_rounds=4)
    assert fixed > 0
    assert per_byte >= 0


def test_loads_fit_small_models():
    for load in make_loads(2, 64, quick=False):
        assert load.prompt_len + load.output_len <= 64
        assert load.num_clients <= 2


@pytest.mark.slow
def test_the_cluster_is_measured_too(tmp_path):
    path = tmp_path / "demo.json"
    result = CliRunner().invoke(command, [str(model_dir()), "--quick", "--dtype", "bfloat16", "--output", str(path)])
    assert result.exit_code == 0, result.output
    costs = read_profile(path).cluster
    assert costs is not None
    assert 0 < costs.message < 0.1
    assert 0 < costs.token < 0.1
    assert costs.cpu_per_token + costs.cpu_per_request > 0
