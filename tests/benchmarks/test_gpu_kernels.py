"""The GPU benchmarks run from end to end on a machine without a GPU, when asked to rehearse."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ("decode step, batch 1,", "prefill, 1 x", "output tokens")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu.run", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_rehearsal_checks_everything_and_writes_the_table(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path / "results" / "dry"))
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads((tmp_path / "results" / "dry.json").read_text())
    assert written["run"]["dry"] is True
    assert "--dry-run" in written["run"]["command"]
    assert {"torch", "triton"} <= written["run"]["packages"].keys()
    assert (tmp_path / "results" / "dry.png").stat().st_size > 1000
    assert [point["batch_size"] for point in written["decode"]] == [1, 2, 5]
    for kernel in (
        "pack KV",
        "unpack KV",
        "decode attention",
        "prefill attention",
        "grouped matmul",
        "draw a token",
        *ENGINE,
    ):
        rows = [row for row in written["rows"] if row["what"].startswith(kernel)]
        assert rows
        assert all(row["achieved"] > 0 and row["ceiling"] > 0 and row["ratio"] > 0 for row in rows)
    table = (tmp_path / "results" / "dry.md").read_text()
    assert "| what | achieved | ceiling |" in table
    assert "the figures mean nothing" in done.stdout


def test_without_a_card_it_says_what_to_do():
    done = run()
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
