import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from distserve.cluster.costs import make_loads, measure_pulls
from distserve.cluster.profile_command import profile as command
from distserve.cluster.profile_file import read_profile, write_profile
from distserve.core.config import KvLayout, ParallelConfig
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
    assert "errors of the fit" in result.output
    return path


def test_a_profile_says_what_it_was_taken_of(engine_profile):
    profile = read_profile(engine_profile)
    assert profile.dtype == "float32"
    assert profile.limits["max_batch_tokens"] == 64
    assert profile.machine["cores"]
    assert profile.cluster is None
    (shape,) = profile.shapes
    assert set(shape.residuals) == {"decode", "prefill", "mixed"}
    measured = next(m for m in shape.measurements if m.shape.num_decodes == 4 and not m.shape.num_prefill_tokens)
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
    for text in ("{", "[]", '{"format": "distserve-profile/3"}', "\xff"):
        broken.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"broken\.json is no profile.*distserve profile"):
            read_profile(broken)
    data = json.loads(engine_profile.read_text())
    broken.write_text(json.dumps(data | {"format": "distserve-profile/0"}))
    with pytest.raises(ConfigError, match="profile anew"):
        read_profile(broken)
    data["shapes"][0]["fit"]["prefill"]["knots"].reverse()
    broken.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="rising"):
        read_profile(broken)
    broken.write_text(json.dumps(data | {"shapes": []}))
    with pytest.raises(ConfigError, match="needs a shape"):
        read_profile(broken)


def test_a_file_of_the_format_before_is_of_one_rank(engine_profile, tmp_path):
    data = json.loads(engine_profile.read_text())
    (shape,) = data.pop("shapes")
    del shape["parallel"], shape["through"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data | shape | {"format": "distserve-profile/2"}))
    assert read_profile(old) == read_profile(engine_profile)


def test_shapes_are_measured_on_real_ranks(tmp_path):
    path = tmp_path / "shapes.json"
    options = ["--engine-only", "--quick", "--max-batch-size", "2", "--max-batch-tokens", "16", "--max-model-len", "80"]
    shapes = [*("--shape", "1x2"), *("--shape", "1x1"), *("--shape", "1x2")]
    result = CliRunner().invoke(command, [str(model_dir()), *options, *shapes, "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert "through all of them" in result.output
    profile = read_profile(path)
    assert [shape.parallel for shape in profile.shapes] == [ParallelConfig(1, 2), ParallelConfig()]
    two_stages = profile.shape(ParallelConfig(1, 2))
    assert "through all stages" in two_stages.residuals
    time = profile.step_time(ParallelConfig(1, 2))
    for m in two_stages.measurements:
        assert 0 < m.least <= m.median
        assert m.through > 0
        if not m.shape.num_prefill_tokens:
            assert 2 * time.seconds(m.shape) + time.handover(m.shape) == pytest.approx(m.through)
    with pytest.raises(ConfigError, match="--shape 1x2 --shape 1x1 --shape 2x1"):
        profile.step_time(ParallelConfig(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "2"], "'2' is not tp x pp"),
        (["--shape", "0x1"], "'0x1' is not tp x pp"),
        (["--shape", "3x1", "--engine-only"], "tp 3 does not divide the model's 2 KV heads"),
        (["--shape", "1x99", "--engine-only"], "pp 99 is more than the model's"),
        (["--shape", "2x1"], "add --shape 1x1, or --engine-only"),
        (["--device", "cuda"], "add --engine-only"),
    ],
)
def test_shapes_that_cannot_be_measured_are_refused_before_anything_is(options, message, tmp_path):
    result = CliRunner().invoke(command, [str(model_dir()), *options, "--output", str(tmp_path / "p.json")])
    assert result.exit_code
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(tmp_path):
    options = ["--device", "cuda", "--engine-only", "--output", str(tmp_path / "p.json")]
    result = CliRunner().invoke(command, [str(model_dir()), *options])
    assert result.exit_code == 1
    assert "torch finds no CUDA device" in result.output


@pytest.mark.gpu
def test_a_gpu_is_profiled(tmp_path):
    path = tmp_path / "p.json"
    options = ["--device", "cuda", "--engine-only", "--quick", "--dtype", "bfloat16", "--output", str(path)]
    result = CliRunner().invoke(command, [str(model_dir()), *options])
    assert result.exit_code == 0, result.output
    profile = read_profile(path)
    assert profile.machine["gpu"] == torch.cuda.get_device_name()
    step = StepShape(num_decodes=4, decode_context=400)
    assert 0 < profile.step_time().seconds(step) < 0.1


def test_wrong_arguments_end_with_a_sentence(tmp_path, monkeypatch):
    result = CliRunner().invoke(command, [str(tmp_path / "no-model")])
    assert result.exit_code == 1
    assert "no-model does not exist" in result.output
    result = CliRunner().invoke(command, [str(model_dir()), "--output", str(tmp_path / "no" / "dir.json")])
    assert result.exit_code == 1
    assert "no directory" in result.output
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    result = CliRunner().invoke(command, [str(model_dir()), "--output", str(tmp_path / "p.json")])
    assert result.exit_code == 1
    assert "nothing can be written to" in result.output


def test_a_profile_that_cannot_be_written_whole_leaves_the_one_before(engine_profile, tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    profile = read_profile(engine_profile)
    write_profile(profile, path)
    before = path.read_bytes()

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_profile(profile, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pulls_take_time_by_the_byte():
    layout = KvLayout(num_layers=4, num_blocks=8, block_size=16, num_kv_heads=2, head_dim=32, dtype="float32")
    fixed, per_byte = measure_pulls(layout, num_blocks=32, num_rounds=4)
    assert fixed > 0
    assert per_byte >= 0


def test_loads_fit_small_models():
    loads = make_loads(2, 64, quick=False)
    for load in (*loads.usual, *loads.rested):
        assert load.prompt_len + load.output_len <= 64
    assert all(load.num_clients <= 2 for load in (*loads.usual, *loads.rested))


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
