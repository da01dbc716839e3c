"""The engine's whole path over the Triton kernels, padding included, on a machine without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.conftest import Served

ROOT = Path(__file__).parents[3]
NUM_TOKENS = 5


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_greedy_text_by_interpreted_kernels_is_that_of_generate(served: Callable[[str], Served], name: str) -> None:
    model = served(name)
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}:{ROOT / 'kernels'}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(model.path), json.dumps(model.prompts[:3]), str(NUM_TOKENS)]
    command = [sys.executable, "-m", "tests.engine.device.interpreted", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["texts"] == [expected[:NUM_TOKENS] for expected in model.expected[:3]]
    assert result["calls"] > 100
    assert result["replays"] >= NUM_TOKENS - 2
    assert result["untouched"]
