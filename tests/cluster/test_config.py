"""Configuration: what is wrong is named with its place and what would be valid; what is right becomes one launch."""

from pathlib import Path
from typing import Any

import pytest

from distserve.cluster.config import ServeConfig, load_config
from distserve.cluster.sizing import PROCESS_BYTES, KvRequest, size_kv
from distserve.core.config import Role
from distserve.core.errors import ConfigError
from distserve.demo import model_dir


def load(tmp_path: Path, text: str, **flags: Any) -> ServeConfig:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return load_config(file, flags, model_dir())


def test_nothing_said_is_the_demo_model_on_one_instance_each() -> None:
    config = load_config(None, {}, model_dir())
    assert config.model_dir == model_dir()
    assert config.pools == ((Role.PREFILL, 1), (Role.DECODE, 1))
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.served_model_names == ("distserve-demo",)


def test_the_file_is_read_and_flags_win(tmp_path: Path) -> None:
    text = f"""
model: {model_dir()}
slo: {{ttft: 0.4, tpot: 0.04, attainment: 0.9}}
workload: {{trace: azure2023_conv.csv}}
cluster: {{gpu: h100-sxm, nodes: 4}}
placement:
  prefill: {{instances: 3}}
  decode: {{instances: 2}}
engine: {{dtype: bfloat16, kv_tokens: 4096, threads: 2}}
serving: {{port: 9000, served_model_name: "a,b"}}
"""
    config = load(tmp_path, text, **{"placement.prefill.instances": 1, "serving.port": 9001, "engine.dtype": None})
    assert config.pools == ((Role.PREFILL, 1), (Role.DECODE, 2))
    assert config.port == 9001
    assert config.engine.dtype == "bfloat16"
    assert config.engine.kv == KvRequest(num_tokens=4096)
    assert config.served_model_names == ("a", "b")


def test_mixed_instances_need_no_others() -> None:
    config = load_config(None, {"placement.mixed.instances": 2}, model_dir())
    assert config.pools == ((Role.MIXED, 2),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x", ["serve.yaml, line 1: modle is unknown", "model"]),
        ("engine:\n  dtype: int4", ["line 2: engine.dtype", "'int4'", "'float32' or 'bfloat16'"]),
        ("engine:\n  kv_tokns: 5", ["line 2: engine.kv_tokns is unknown", "kv_tokens"]),
        ("serving:\n\n  port: 70000", ["line 3: serving.port", "70000", "65535"]),
        ("slo: {ttft: -1, tpot: 0.1}", ["slo.ttft", "-1", "greater than 0"]),
        ("slo: {ttft: 1}", ["slo.tpot"]),
        ("placement: best", ["placement", "auto"]),
        ("placement: auto", ["planner"]),
        ("placement: {prefill: {instances: 0}, decode: {instances: 0}}", ["no instances"]),
        ("placement: {prefill: {instances: 0}}", ["no prefill instance"]),
        ("placement: {decode: {instances: 0}}", ["no decode instance"]),
        ("placement: {decode: {instances: two}}", ["placement.decode.instances", "'two'"]),
        ("placement: {decode: {count: 2}}", ["placement.decode.count is unknown", "instances"]),
        ("model: /nowhere/at/all", ["/nowhere/at/all"]),
        ("- model", ["expected keys"]),
        ("a: [", ["not valid YAML", "line"]),
        ("engine: {threads: 0}\nserving: {drain_timeout: -1}", ["engine.threads", "serving.drain_timeout"]),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    for part in expected:
        assert part in str(error.value)


def test_mistakes_in_flags_are_named_as_flags() -> None:
    with pytest.raises(ConfigError, match="--block-size"):
        load_config(None, {"engine.block_size": 0}, model_dir())
    with pytest.raises(ConfigError, match="--prefill"):
        load_config(None, {"placement.prefill.instances": -2}, model_dir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        load_config(tmp_path / "gone.yaml", {}, model_dir())


GIB = 2**30
SIZES = {"weight_bytes": GIB, "token_bytes": 1024, "max_model_len": 4096, "num_instances": 2}


def test_kv_is_what_was_asked_for() -> None:
    assert size_kv(KvRequest(num_tokens=100), free=16 * GIB, **SIZES).num_blocks == 7
    assert size_kv(KvRequest(num_bytes=64 * 1024), free=16 * GIB, **SIZES).num_tokens == 64
    assert size_kv(KvRequest(num_tokens=100, block_size=8), free=16 * GIB, **SIZES).num_blocks == 13


def test_kv_by_default_fits_and_holds_a_full_sequence() -> None:
    for free in (4 * GIB, 6 * GIB, 64 * GIB):
        kv = size_kv(KvRequest(), free=free, **SIZES)
        assert kv.num_tokens >= SIZES["max_model_len"]
        assert 2 * (GIB + PROCESS_BYTES + kv.num_tokens * 1024) <= free


def test_more_instances_than_memory_holds_is_an_error_with_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        size_kv(KvRequest(num_tokens=2**20), free=4 * GIB, **SIZES)
    for part in ("2 instances need 4.8 GiB", "4.0 GiB are free", "1.0 GiB of KV (1048576 tokens)", "--kv-tokens"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="3 would fit"):
        size_kv(KvRequest(num_tokens=1024), free=5 * GIB, **{**SIZES, "num_instances": 10})
    with pytest.raises(ConfigError, match="not a single block"):
        size_kv(KvRequest(num_bytes=100), free=64 * GIB, **SIZES)
