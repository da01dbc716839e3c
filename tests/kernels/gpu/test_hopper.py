"""Every kernel compiles for a Hopper GPU, into the instructions that its speed rests on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")]


def compile_all(dtype: str, cache: Path) -> list[dict]:
    """What became of each kernel, in a process of its own: the driver that cannot launch must not stay."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tests.kernels.gpu.hopper", dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_in_bfloat16_with_tensor_cores_wide_loads_and_no_spilled_registers(tmp_path):
    compiled = compile_all("bfloat16", tmp_path)
    kernels = {fact["kernel"] for fact in compiled}
    assert len(kernels) == 13
    for fact in compiled:
        assert fact["stack"] == 0, fact
        if fact["kernel"] not in {"_keys_kernel", "_uniforms_kernel"}:
            assert fact["wide_loads"], fact
        if fact["kernel"] in {"_copy_kernel", "_write_kernel", "_rope_write_kernel"}:
            assert fact["wide_stores"] == fact["stores"], fact
        if fact["kernel"] == "_prefill_kernel":
            assert fact["wgmma"], fact
        if fact["kernel"] in {"_share_kernel", "_prefill_kernel", "_matmul_kernel"}:
            assert fact["async"], fact
            assert fact["ahead"], fact
            assert fact["mma"] + fact["wgmma"], fact


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_in_the_other_types(dtype, tmp_path):
    assert len({fact["kernel"] for fact in compile_all(dtype, tmp_path)}) == 13
