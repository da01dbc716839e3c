"""The papers' claims in simulation: token times of a closed loop, the figures, and each study in small."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.goodput import distserve_claims, fastgen_tables
from benchmarks.goodput.closed_loop import closed_loop
from benchmarks.goodput.distserve_claims import LONGBENCH, RUNS, Effort, crossing, needed, scripted, study, write
from benchmarks.goodput.distserve_published import PUBLISHED
from benchmarks.goodput.distserve_report import STYLES
from benchmarks.goodput.distserve_systems import SHORT_ANSWER, System
from benchmarks.goodput.fastgen_report import PAIRS, Claims, Point, draw, report
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Normal
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import (
    SLO,
    InstanceSpec,
    KvConfig,
    ParallelConfig,
    PrefillPolicy,
    Role,
    SchedulerConfig,
)
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec
from placement.candidates import Candidate
from placement.problem import Problem
from placement.shapes import Shape
from simulator.latency.analytic import AnalyticModel
from simulator.latency.shape import ModelShape
from simulator.model import InstanceModel
from simulator.results import Timelines

STEP = LinearStepTime(base=0.02, per_token=0.001, per_pair=0.0, per_context=0.0)
OPT_13B = {
    "model_type": "opt",
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}


def instance(policy: PrefillPolicy, tokens: int) -> InstanceModel:
    scheduler = SchedulerConfig(max_batch_tokens=tokens, max_batch_size=8, policy=policy)
    return InstanceModel(InstanceSpec("mixed-0", Role.MIXED, KvConfig(1000), scheduler), STEP)


def gaps(policy: PrefillPolicy, tokens: int) -> list[list[float]]:
    """Two clients; the second's prompt of 100 tokens comes while the first one's output of 12 is under way."""
    records = closed_loop(instance(policy, tokens), np.array([10, 100]), np.array([12, 3]), [0.0, 0.1])
    assert [record.num_output_tokens for record in records] == [12, 3]
    return [np.diff(record.event_times).tolist() for record in records]


def test_a_whole_prompt_stalls_who_decodes() -> None:
    first, second = gaps(PrefillPolicy.WHOLE_PROMPT, 100)
    # A prompt's step of 0.02 + 100 x 0.001 and the decode step after it, which has two sequences.
    assert max(first) == pytest.approx(0.12 + 0.022)
    assert sorted(first)[-2] == pytest.approx(0.022)
    assert second == pytest.approx([0.022, 0.022])


def test_a_split_prompt_does_not() -> None:
    first, second = gaps(PrefillPolicy.SPLITFUSE, 26)
    # Four steps with 25 tokens of the prompt beside the decode.
    assert sum(gap == pytest.approx(0.02 + 0.026) for gap in first) == 4
    assert max(first) == pytest.approx(0.046)
    assert second == pytest.approx([0.022, 0.022])


def test_a_client_sends_when_it_has_its_answer() -> None:
    system = instance(PrefillPolicy.SPLITFUSE, 64)
    records = closed_loop(system, np.full(5, 10), np.full(5, 4), [0.0, 0.0])
    ends = sorted(record.end for record in records)
    assert [record.scheduled for record in records] == [0.0, 0.0, *ends[:3]]


def point(system: str, clients: int, throughput: float, latency: float) -> Point:
    none = {"2": 0.0, "4": 0.0, "6": 0.0}
    return Point(system, 1200, 128, clients, throughput, latency, 0.1, none, none, 0.1, 0.1, 0.1)


def test_figures_between_points() -> None:
    claims = Claims([point("a", 4, 0.5, 2.0), point("a", 8, 1.5, 4.0), point("b", 4, 0.25, 2.0), point("b", 8, 1, 8.0)])
    assert claims.throughput_at("a", 3.0) == pytest.approx(1.0)
    assert claims.throughput_at("a", 9.0) is None
    assert claims.latency_at("b", 0.5) == pytest.approx(4.0)
    gain = claims.largest_gain(("a", "b"))
    assert gain is not None
    assert gain == pytest.approx((1.5 / 0.5, 4.0), rel=1e-6)


def test_where_a_rate_crosses() -> None:
    assert crossing({1.0: 1.0, 2.0: 0.8, 3.0: 0.95}) == pytest.approx(1.5)
    assert crossing({1.0: 0.89, 2.0: 0.5}) is None
    assert crossing({1.0: 1.0, 2.0: 0.9}) == 2.0
    assert scripted((1.0, 2.0, 3.0), (1.0, 0.8, 0.95)) == pytest.approx(1.5)
    assert scripted((1.0, 2.0), (0.5, 0.4)) == 1.0, "its script gives the lowest rate where none holds"
    assert scripted((1.0, 2.0), (0.95, 0.92)) == 2.0


def test_factors_that_requests_need() -> None:
    columns: dict[str, Any] = {name: np.zeros(2) for name in Timelines.__dataclass_fields__}
    columns |= {"status": np.array([200, 429]), "output_tokens": np.array([11, 11])}
    columns |= {"first_token": np.array([0.5, np.nan]), "finish": np.array([2.5, np.nan])}
    both = needed(Timelines(**columns), SLO(ttft=0.25, tpot=0.4), steady=False)
    assert both[:, 0] == pytest.approx([2.0, 0.5])
    assert np.isinf(both[:, 1]).all()


def test_fastgens_claims_point_the_papers_way(tmp_path: Path) -> None:
    names = [system for pair in PAIRS.values() for system in pair]
    points = [
        fastgen_tables.measure(name, *lengths, clients, 48)
        for name in dict.fromkeys(names)
        for lengths in ((1200, 128), (2600, 60), (2600, 128))
        for clients in (4, 16)
    ]
    claims = Claims(points)
    same, paper, _ = claims.table()
    assert same["gap_p95_16_clients"][2] > 1.5, "whole prompts stall whoever decodes"
    assert paper["effective_at_4_tokens_per_s"][2] > same["effective_at_4_tokens_per_s"][2] >= 1
    draw(points, tmp_path)
    fastgen_tables.write_csv(points, tmp_path / "fastgen.csv")
    assert len((tmp_path / "fastgen.csv").read_text().splitlines()) == 1 + len(points)
    text = report(claims, {"date": "2026-01-01", "command": "x"}, 48)
    assert "**" in text
    assert all(f"({file.name})" in text for file in tmp_path.iterdir())


def one_instance(engine: str) -> System:
    """OPT-13B on one A100, whole prompts."""
    model = ModelShape.from_config(OPT_13B, name="opt-13b")
    cluster = ClusterSpec("a100-80g-sxm", 1, 1, 300e9, 3e9)
    workload = WorkloadSpec(Gamma(), Normal(700, 300, 1500), Normal(50, 20, 100), num_requests=1)
    latency = AnalyticModel(model, cluster, engine=engine)
    problem = Problem(model, SLO(0.5, 0.1), workload, None, cluster, latency)
    kv = problem.kv(ParallelConfig(), 2560)
    assert kv is not None
    shape = Shape(Role.MIXED, ParallelConfig(), PrefillPolicy.WHOLE_PROMPT, kv, 2560, 256, nodes=1)
    return System(engine, problem, Candidate(((shape, 1),)))


def test_a_slower_baseline_holds_less(tmp_path: Path) -> None:
    published = replace(PUBLISHED["opt-13b-sharegpt"], rates=(1.0, 3.0), scale_rate=1.0)
    found = {}
    for engine in ("distserve", "vllm-2023"):
        found[engine] = study(one_instance(engine), published, SLO(0.5, 0.1), Effort(1, 60))
    fast, slow = found["distserve"], found["vllm-2023"]
    assert fast.rate is not None
    assert slow.rate is not None
    assert fast.scale is not None
    assert slow.scale is not None
    assert fast.rate > slow.rate
    assert fast.scale < slow.scale
    # The scale is where the curve over scales crosses; both limits together need what the stricter one does, or more.
    assert all(
        (share >= 0.9) == (scale >= fast.scale)
        for scale, share in zip(fast.scales, fast.attained_at_scale, strict=True)
    )
    assert fast.ttft is not None
    assert fast.tpot is not None
    assert fast.scale >= max(fast.ttft, fast.tpot)
    mixed = one_instance("distserve").with_short_answers(0.5)
    lens = mixed.offered.at(1.0, 0, 2000).output_lens
    assert (lens == SHORT_ANSWER).mean() == pytest.approx(0.5, abs=0.05)
    assert lens.mean() == pytest.approx(one_instance("distserve").offered.sample[1].mean(), rel=0.05)


def test_tables_and_plots_of_any_outcome(tmp_path: Path) -> None:
    figures = {"gpus": 1, "rates": (1.0, 2.0), "attained": (1.0, 0.5), "scales": (0.5, 1.0)}
    figures |= {"attained_at_scale": (0.1, 1.0), "rate": 1.5, "scale": 0.8, "ttft": 0.8, "tpot": 0.2}
    figures |= {"scripted_rate": 1.2, "lone": 0.5}
    never = figures | {"rate": None, "scale": None, "ttft": None}
    systems = dict.fromkeys(STYLES, figures) | {"our whole prompts": figures, "our SplitFuse": never}
    systems |= dict.fromkeys(("small batches", "SplitFuse", "best shape", "served"), never)
    runs = dict.fromkeys(RUNS, systems)
    result = {"case": "opt-13b-sharegpt", "slo": {"ttft": 0.25, "tpot": 0.1}, **runs}
    write([result], {"date": "2026-01-01", "command": "x"}, 1, tmp_path)
    text = (tmp_path / "distserve.md").read_text()
    assert "**1.00x** (1.5 / 1.5)" in text
    assert "1.5 / never" in text
    assert json.loads((tmp_path / "distserve.json").read_text())["cases"][0]["steady"]
    lines = (tmp_path / "distserve.csv").read_text().splitlines()
    assert len(lines) == 1 + len(RUNS) * len(systems) * 4


@pytest.mark.slow
@pytest.mark.parametrize(("module", "options"), [("fastgen_tables", []), ("distserve_claims", ["--cases", LONGBENCH])])
def test_the_command_from_end_to_end(
    module: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--quick", *options, "--output", str(tmp_path)])
    {"fastgen_tables": fastgen_tables, "distserve_claims": distserve_claims}[module].main()
    assert {file.suffix for file in tmp_path.iterdir()} == {".csv", ".json", ".md", ".png"}
