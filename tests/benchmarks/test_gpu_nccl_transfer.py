"""The benchmark of the NCCL transport runs from end to end on a machine without a GPU, when asked to rehearse."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu.nccl_transfer", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_rehearsal_moves_kv_and_writes_table_and_timeline(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path / "results" / "dry"))
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads((tmp_path / "results" / "dry.json").read_text())
    assert written["run"]["dry"] is True
    assert len(written["rows"]) == 3
    assert all(row["achieved"] > 0 and row["ceiling"] > 0 and row["ratio"] > 0 for row in written["rows"])
    overlap = written["overlap"]
    assert len(overlap["layers_passed"]) == 4
    assert all(begin <= end <= overlap["pull_ended"] for begin, end in overlap["pieces_received"])
    table = (tmp_path / "results" / "dry.md").read_text()
    assert "| what | achieved | ceiling |" in table
    assert "piece   " in table
    assert "the figures mean nothing" in done.stdout


def test_without_a_card_it_says_what_to_do():
    done = run()
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
