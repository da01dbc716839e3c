"""The optional source of measured kernel tables: without its package, and against the answers of its package."""

import sys
from pathlib import Path

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency.aiconfigurator import AiconfiguratorModel
from simulator.latency.shape import ModelShape

QWEN3_32B = ModelShape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936)


def model(gpu="h200", name="Qwen/Qwen3-32B"):
    return AiconfiguratorModel(name, QWEN3_32B, ClusterSpec(gpu, 1, 8, 450e9, 50e9))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.engine", None)
    with pytest.raises(ConfigError, match="pip install aiconfigurator-core"):
        model().step_time(ParallelConfig())


def test_a_gpu_without_tables_is_refused():
    with pytest.raises(ConfigError, match="no tables for rtx4090"):
        model("rtx4090").step_time(ParallelConfig())


def test_a_model_it_cannot_compose_is_refused(tmp_path: Path):
    pytest.importorskip("aiconfigurator_core")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(ConfigError, match="no step times of"):
        model(name=str(tmp_path)).step_time(ParallelConfig())


def test_its_tables_give_the_packages_own_answers():
    engine = pytest.importorskip("aiconfigurator_core.sdk.engine")
    time = model().step_time(ParallelConfig(tp=4))
    handle = engine.EngineHandle.compile("Qwen/Qwen3-32B", "h200_sxm", "vllm", tp_size=4)
    for length in (300, 1500, 4000):
        step = StepShape(length, length * (length + 1) // 2, num_prefills=1)
        assert time.seconds(step) * 1e3 == pytest.approx(handle.predict_prefill_latency(1, length), rel=0.05)
    for batch, context in ((1, 3000), (24, 1024), (200, 5000)):
        step = StepShape(num_decodes=batch, decode_context=batch * context)
        assert time.seconds(step) * 1e3 == pytest.approx(handle.predict_decode_latency(batch, context, 2), rel=0.05)
    half = model().step_time(ParallelConfig(tp=4, pp=2))
    assert half.seconds(step) == pytest.approx(time.seconds(step) / 2, rel=0.02)
