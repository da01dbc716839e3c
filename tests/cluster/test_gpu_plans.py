"""What a plan on GPUs of several nodes becomes: a GPU for each instance, KV memory as planned, and a network."""

from pathlib import Path

import pytest

from distserve.cluster.config import load_config
from distserve.cluster.describe import ModelFacts
from distserve.cluster.launch import _blueprint
from distserve.cluster.network import create_key
from distserve.cluster.parts import KvAccess
from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError
from distserve.demo import model_dir

PLAN = """
placement:
  prefill: {{instances: 1, gpus: [[[0, 0]]], kv_tokens: 3000}}
  decode: {{instances: 1, gpus: [[[{node}, 1]]]}}
cluster: {{gpu: h100-sxm, nodes: 2, gpus_per_node: 2}}
engine: {{kv_transport: {transport}, {kv}}}
"""
FACTS = ModelFacts(weight_bytes=2**20, token_bytes=2048, max_model_len=1024, num_layers=4, num_kv_heads=2)


def blueprint(directory: Path, *, transport: str = "auto", node: int = 1, kv: str = "kv_tokens: 5000"):
    (directory / "plan.yaml").write_text(PLAN.format(transport=transport, node=node, kv=kv))
    config = load_config(directory / "plan.yaml", {}, model_dir())
    return _blueprint(config, FACTS, 1, create_key(), None)


@pytest.mark.parametrize("transport", ["auto", "nccl", "tcp"])
@pytest.mark.parametrize("node", [0, 1])
def test_every_instance_has_a_gpu_and_a_port(tmp_path, transport, node):
    made = blueprint(tmp_path, transport=transport, node=node)
    assert made.gpus_per_rank == 1
    assert made.plan.device == "cuda:0", "the one GPU that a process sees"
    # Also within a node: a process does not see the other's GPU.
    assert made.kv_access == KvAccess(transport, None, opens_port=True)
    assert [spec.kv for spec in made.specs] == [KvConfig(188), KvConfig(313)]
    assert all(spec.scheduler.lookahead and spec.scheduler.max_in_flight == 2 for spec in made.specs)


def test_kv_memory_in_bytes(tmp_path):
    made = blueprint(tmp_path, kv="kv_memory: 1048576")
    assert [spec.kv for spec in made.specs] == [KvConfig(188), KvConfig(32)]
    with pytest.raises(ConfigError, match="not a single block"):
        blueprint(tmp_path, kv="kv_memory: 100")


def test_nccl_is_for_several_gpus():
    with pytest.raises(ConfigError, match=r"nccl is for KV between GPUs, and with engine\.gpu .* leave it"):
        load_config(None, {"engine.gpu": 0, "engine.kv_transport": "nccl"}, model_dir())


def test_the_router_knows_who_is_near_whom_as_in_the_simulated_plan(tmp_path):
    assert blueprint(tmp_path, node=0).router.near == {"prefill-0": ("decode-0",)}
    assert blueprint(tmp_path, node=1).router.near == {"prefill-0": ()}
