"""Measured runs of vLLM replayed: how far off every number is, where the measurements are at hand."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity_vllm.compare import Row, compare, first_wave
from benchmarks.fidelity_vllm.replay import KERNELS_ALONE, Run, block_keys, replay
from benchmarks.fidelity_vllm.run import load_runs

DATA = Path(__file__).parents[3] / "shared/data/groundtruth/llmservingsim"

needs_data = pytest.mark.skipif(not DATA.exists(), reason="no measured runs here")


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {run.card.name: run for run in load_runs(DATA)}


def larger(rows: list[Row]) -> list[Row]:
    assert len(rows) == 15
    return [row for row in rows if not row.holds]


@needs_data
@pytest.mark.parametrize("card", ["RTX 4090", "RTX PRO 6000"])
def test_no_error_is_larger_than_the_other_simulators(runs: dict[str, Run], card: str) -> None:
    assert larger(compare(runs[card], replay(runs[card]))) == []


@needs_data
def test_where_memory_runs_out_the_kernels_times_alone_nearly_say_it(runs: dict[str, Run]) -> None:
    rows = compare(runs["RTX 4090"], replay(runs["RTX 4090"], KERNELS_ALONE))
    assert {row.metric for row in larger(rows)} <= {"TPOT"}
    assert max(abs(row.error) for row in rows) < 1


@needs_data
def test_the_schedule_is_followed_request_by_request(runs: dict[str, Run]) -> None:
    """Preemption, recomputation and shared blocks and all, for three minutes."""
    run = runs["RTX 4090"]
    simulation = replay(run)
    lines = simulation.timelines
    assert np.median(np.abs(lines.first_token - run.first_token)) < 0.4
    assert np.median(np.abs(lines.finish - run.finish)) < 0.4
    wave = first_wave(run, simulation)
    assert (wave.num_first, wave.num_last) == (41, 15)
    assert wave.first_error < 0.02


def test_prompts_share_keys_as_far_as_the_table_says() -> None:
    # Request 47 begins with the 455 tokens of request 40: 28 blocks of 16.
    keys = block_keys([600] * 300, 16)
    assert keys[47][:28] == keys[40][:28]
    assert not set(keys[47][28:]) & set(keys[40])
    assert all(len(prompt) == len(set(prompt)) == 37 for prompt in keys)
    # A conversation of three turns: 139 begins like 117, and that like 45.
    assert keys[139][:24] == keys[117][:24] == keys[45][:24]
    assert not set(keys[0]) & set(keys[1])
