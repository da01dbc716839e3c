"""Runs the checks of this folder in a process that interprets Triton's kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_kernels_pass_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER), f"--ignore={__file__}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_package_imports_and_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
import distserve_kernels as kernels
x = torch.ones(2, 8)
assert torch.equal(kernels.silu_mul(x), kernels.reference.silu_mul(x))
kernels.write_kv(x.view(2, 1, 8), x.view(2, 1, 8), torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8), torch.arange(2))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
