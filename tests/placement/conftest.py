"""Configurations as users write them, in a directory of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

OPT_13B: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "ffn_dim": 20480,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}

CONFIG: dict[str, Any] = {
    "model": "opt-13b.json",
    "slo": {"ttft": 0.4, "tpot": 0.1, "attainment": 0.9},
    "workload": {
        "prompt": {"lognormal": {"mean": 400, "cv": 0.8, "max": 1500}},
        "output": {"lognormal": {"mean": 12, "cv": 0.5, "max": 60}},
        "arrivals": {"rate": 2, "cv": 1},
    },
    "cluster": {
        "gpu": "a100-80g-sxm",
        "nodes": 1,
        "gpus_per_node": 2,
        "intra_node_bandwidth": 300e9,
        "inter_node_bandwidth": 3e9,
    },
}

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """``write_config(slo={...}, cluster={...})`` updates sections of a good configuration; None removes a key."""

    def write(**changes: Any) -> Path:
        (tmp_path / "opt-13b.json").write_text(json.dumps(OPT_13B))
        data: dict[str, Any] = json.loads(json.dumps(CONFIG))
        for section, change in changes.items():
            if isinstance(change, dict) and isinstance(data.get(section), dict):
                merged = data[section] | change
                data[section] = {key: value for key, value in merged.items() if value is not None}
            else:
                data[section] = change
        path = tmp_path / "service.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write
