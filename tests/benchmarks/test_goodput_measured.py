"""Measured goodputs: which rates are asked for, what is kept and gone on with, and what the reports say of it."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.servers import Server, ServerError
from benchmarks.common.slices import Slice, SliceOverError
from benchmarks.common.store import Store
from benchmarks.fidelity_cpu.predict import Mix
from benchmarks.goodput import reach, real
from benchmarks.goodput.measured import reach_report
from benchmarks.goodput.measured.contenders import CONTENDERS
from benchmarks.goodput.measured.invocation import prepared
from benchmarks.goodput.measured.ladder import Ladder, bracket, goodput
from benchmarks.goodput.measured.prediction import predict
from benchmarks.goodput.measured.real_report import write_report
from benchmarks.goodput.measured.results import Results
from benchmarks.goodput.measured.runs import OBJECTIVES, WORKLOADS, Requests, balanced
from distserve.bench.traces import read_trace
from simulator.latency.measured import ProfileLatencyModel

PROFILE = Path(__file__).parents[2] / "benchmarks/fidelity_cpu/results/profile-2-mixed.json"
MODEL_CONFIG = '{"vocab_size": 100}'


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=3))
def test_a_ladder_brackets_what_it_can_and_ends(capacities: list[float]) -> None:
    ladder = Ladder()
    curve: dict[float, list[float]] = {}
    while (rate := ladder.next_rate(curve)) is not None:
        assert rate not in curve, "nothing is measured twice"
        assert ladder.least <= rate <= ladder.most
        curve[rate] = [1.0 if rate <= capacity else 0.5 for capacity in capacities]
        assert len(curve) < 40
    for index, capacity in enumerate(capacities):
        low, high = bracket(curve, index, ladder.target)
        if ladder.least <= capacity < ladder.most:
            assert low is not None
            assert high is not None
            assert low <= capacity < high
            assert high / low <= 1.01 * ladder.width, "rates are rounded to hundredths"
            assert low <= goodput(curve, index, ladder.target) < high


def test_another_budget_is_tried_where_the_first_one_failed_and_followed_where_it_is_better() -> None:
    ladder = Ladder()
    curve: dict[float, list[float]] = {}
    asked = []
    while (rate := ladder.next_challenge(curve, [2.0, 4.0, None])) is not None:
        asked.append(rate)
        curve[rate] = [0.0, 1.0 if rate < 5 else 0.0, 1.0]
    assert asked == [2.0, 4.0, 4.8, 5.76]
    assert bracket(curve, 1, 0.9) == (4.8, 5.76)


def test_one_poor_run_below_better_ones_is_no_limit() -> None:
    """Attainment falls with the rate: a run of few requests that says otherwise is weighed against those beside it."""
    assert bracket({1.0: [0.88], 2.0: [0.95], 4.0: [0.5]}, 0, 0.9) == (2.0, 4.0)
    assert bracket({1.0: [0.5], 2.0: [0.95], 4.0: [0.5]}, 0, 0.9) == (None, 1.0)
    # As many requests below 2/3 a second as there.
    assert bracket({0.1: [0.8], 0.5: [1.0], 4.0: [0.5]}, 0, 0.9) == (0.5, 4.0)
    pooled = (0.88 * 1 + 0.95 * 2) / 3
    expected = 2 + 2 * (pooled - 0.9) / (pooled - 0.5)
    assert goodput({1.0: [0.88], 2.0: [0.95], 4.0: [0.5]}, 0, 0.9) == pytest.approx(expected)


def test_a_repetition_follows_a_bracket_that_moved() -> None:
    ladder = Ladder()
    curve: dict[float, list[float]] = {}
    asked = []
    while (rate := ladder.next_repetition(curve, {0: (2.0, 2.4)})) is not None:
        asked.append(rate)
        curve[rate] = [1.0 if rate < 1.8 else 0.0]
    assert asked == [2.0, 2.4, 1.67]
    assert goodput(curve, 0, 0.9) == pytest.approx(1.67 + 0.1 * 0.33)


def test_a_repetition_narrows_a_bracket_that_another_objective_left_wide() -> None:
    ladder = Ladder()
    curve: dict[float, list[float]] = {}
    asked = []
    while (rate := ladder.next_repetition(curve, {0: (2.0, 2.4), 1: (6.0, 8.0)})) is not None:
        asked.append(rate)
        curve[rate] = [1.0 if rate < 2.1 else 0.0, 1.0 if rate < 4.0 else 0.0]
    assert asked == [2.0, 2.4, 6.0, 8.0, 3.79, 4.77]
    assert bracket(curve, 1, 0.9) == (3.79, 4.77), "as narrow as the first round's"


@pytest.mark.parametrize("mix", WORKLOADS.values(), ids=list(WORKLOADS))
def test_seeds_of_a_rate_differ_in_the_order_of_their_requests_alone(mix: Mix) -> None:
    one, other = (balanced(mix, rate=2.0, seconds=30.0, seed=seed) for seed in (1, 2))
    for workload in (one, other):
        assert workload.arrivals is not None
        assert len(workload) == 60
        assert (np.diff(workload.arrivals) >= 0).all()
        assert workload.arrivals[0] >= 0
        assert workload.arrivals[-1] < 30
        assert workload.prompt_lens.mean() == pytest.approx(mix.mean_prompt, rel=0.02)
    for name in ("prompt_lens", "output_lens"):
        assert sorted(getattr(one, name)) == sorted(getattr(other, name))
        assert (getattr(one, name) != getattr(other, name)).any()


def test_attainment_counts_what_was_offered_and_one_token_answers_have_no_tpot() -> None:
    def request(at: float, status: str, ttft: float | None, tpot: float | None, output: int) -> dict[str, Any]:
        named = {"scheduled": at, "prompt_len": 5, "output_len": output, "latency": ttft}
        return named | {"status": status, "ttft": ttft, "tpot": tpot}

    requests = Requests.measured(
        [
            request(0.0, "ok", 9.0, 9.0, 4),
            request(1.0, "ok", 0.3, None, 1),
            request(1.5, "ok", 0.3, 0.05, 4),
            request(2.0, "ok", 0.9, 0.01, 4),
            request(2.5, "timeout", None, None, 4),
        ]
    )
    again = Requests.from_json(requests.to_json())
    assert again.attainments(warmup=1.0) == [0.5, 0.75, 0.5]
    assert list(OBJECTIVES) == ["tight TPOT", "balanced", "tight TTFT"]


class Cluster:
    """In place of servers: attainment is 1 up to a capacity in requests/s, and what was asked is on record."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.asked: list[float] = []
        self.starts: list[str] = []

    @contextmanager
    def ours(self, deployment: object, name: str) -> Iterator[Server]:
        if name.startswith("hybrid"):
            raise ServerError("no such mode")
        self.starts.append(name)
        yield Server(name, "http://127.0.0.1:1", (), 1.0)

    @contextmanager
    def vllm_on(self, cores: str, name: str, budget: int) -> Iterator[Server]:
        self.starts.append(name)
        yield Server(name, "http://127.0.0.1:1", (), 1.0)

    def bench(self, url: str, options: dict[str, Any], **_: object) -> dict[str, Any]:
        if "trace" not in options:
            return {}
        trace = read_trace(options["trace"], options["trace_format"])
        assert trace.timestamps is not None
        rate = len(trace) / (options["warmup"] / real._WARM_UP_SHARE)
        self.asked.append(rate)
        ttft = 0.1 if rate <= self.capacity else 3.0
        requests = [
            {
                "scheduled": float(at),
                "prompt_len": int(prompt),
                "output_len": int(output),
                "status": "ok",
                "ttft": ttft,
                "tpot": 0.01,
                "latency": ttft + 0.19,
            }
            for at, prompt, output in zip(trace.timestamps, trace.prompt_lens, trace.output_lens, strict=True)
        ]
        itl = {"mean": 0.01, "p50": 0.01, "p90": 0.01, "p99": 0.012}
        figures = {"request_throughput": rate, "output_token_throughput": 20 * rate, "itl": itl}
        return {"runs": [{"requests": requests, "summary": figures}]}


class Short(Slice):
    """Over when three runs are measured."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(minutes=10.0, max_other_load=float("inf"))
        self._cluster = cluster

    def check(self) -> None:
        if len(self._cluster.asked) >= 3:
            raise SliceOverError("three are enough")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "config.json").write_text(MODEL_CONFIG)
    return argparse.Namespace(
        model=tmp_path,
        only=["chat", "disaggregated", "hybrid", "vllm"],
        rounds=2,
        seconds=30.0,
        minutes=10.0,
        coarse=False,
        default_budgets=False,
        least=0.25,
        quick=False,
        max_other_load=float("inf"),
        output_dir=tmp_path,
    )


def session(options: argparse.Namespace, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> real.Session:
    monkeypatch.setattr(real, "bench", cluster.bench)
    monkeypatch.setattr(real.Session, "_take_profile", lambda self, threads: None)
    cluster.logs = options.model  # type: ignore[attr-defined]
    return real.Session(options, Results(Store(options.output_dir)), cluster)  # type: ignore[arg-type]


def test_measuring_goes_on_where_it_stopped_and_the_report_says_what_is_missing(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(capacity=4.3)
    first = session(options, cluster, monkeypatch)
    monkeypatch.setattr(first, "_slice", Short(cluster))
    with pytest.raises(SliceOverError):
        first.run()
    assert len(cluster.asked) == 3

    second = session(options, cluster, monkeypatch)
    second.run()
    assert second.failures
    assert all("hybrid" in one or "1 prefill + 1 mixed" in one for one in second.failures)
    num_runs = len(cluster.asked)
    names = list(Store(options.output_dir).names("runs"))
    assert len(names) == num_runs, "every run is kept, none measured twice"
    assert any("/vllm-512/" in name for name in names), "other budgets are tried"

    third = session(options, cluster, monkeypatch)
    third.run()
    assert len(cluster.asked) == num_runs, "everything is there"

    results = Results(Store(options.output_dir))
    best = results.best("chat", CONTENDERS["disaggregated"], 1)
    assert best is not None
    assert len(best.goodputs) == 2
    assert best.goodput == pytest.approx(4.3, rel=0.15)
    (options.output_dir / "machine.json").write_text('{"vllm": {}, "cpu": "", "num_cpus": 2}')
    write_report(options.output_dir, results)
    text = (options.output_dir / "report.md").read_text()
    assert "not measured: 1 mixed on 2 cores; 2 mixed, a core each; 1 prefill + 1 mixed" in text
    assert (options.output_dir / "attainment.png").stat().st_size > 0
    assert len((options.output_dir / "runs.csv").read_text().splitlines()) == 1 + num_runs


def test_a_run_beside_other_processes_is_not_kept(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    options.max_other_load = -1000.0
    with pytest.raises(SliceOverError, match="other processes"):
        session(options, Cluster(4.0), monkeypatch).run()
    assert not list(Store(options.output_dir).names("runs"))


def test_a_round_that_was_cut_off_counts_in_no_goodput(tmp_path: Path) -> None:
    results = Results(Store(tmp_path))

    def keep(number: int, rate: float, ttft: float) -> None:
        request = {"scheduled": 1.0, "prompt_len": 5, "output_len": 4, "latency": ttft + 0.03}
        requests = Requests.measured([request | {"status": "ok", "ttft": ttft, "tpot": 0.01}]).to_json()
        run = {"round": number, "workload": "chat", "contender": "vllm", "budget": 2048, "rate": rate}
        results.keep(run | {"warmup": 0.0, "requests": requests})

    def num_rounds() -> int:
        best = results.best("chat", CONTENDERS["vllm"], 1)
        assert best is not None
        return len(best.goodputs)

    keep(1, 2.0, 0.1)
    keep(1, 2.4, 9.0)
    keep(2, 2.0, 0.1)
    assert num_rounds() == 1
    keep(2, 2.4, 9.0)
    assert num_rounds() == 2


def test_a_budget_is_best_by_the_median_of_its_rounds(tmp_path: Path) -> None:
    results = Results(Store(tmp_path))
    vllm = CONTENDERS["vllm"]

    def keep(number: int, budget: int, limit: float) -> None:
        """A round in which ``limit`` lies between two rates, measured on both sides."""
        for rate in (2.0, 2.4, 2.88):
            request = {"scheduled": 1.0, "prompt_len": 5, "output_len": 4, "status": "ok", "tpot": 0.01, "latency": 1.0}
            requests = Requests.measured([request | {"ttft": 0.1 if rate <= limit else 9.0}]).to_json()
            run = {"round": number, "workload": "chat", "contender": "vllm", "budget": budget, "rate": rate}
            results.keep(run | {"warmup": 0.0, "requests": requests})

    for budget, limit in zip(vllm.budgets, (2.2, 2.3, 1.0), strict=True):
        keep(1, budget, limit)
    first, second, _ = vllm.budgets
    assert [one.budget for one in results.candidates("chat", vllm, 1)] == [first, second], "as good in the first round"
    for number in (2, 3):
        keep(number, first, 1.0)
        keep(number, second, 2.5)
    best = results.best("chat", vllm, 1)
    assert best is not None
    assert (best.budget, len(best.goodputs)) == (second, 3)
    assert best.goodput == pytest.approx(2.448)


def test_reach_tells_met_from_missed_from_not_measured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    contest = reach.CONTESTS[0]
    cells = {cell.name: cell for cell in contest.cells}
    for number in (1, 2, 3):
        for name, ours, theirs in (("closed_1", 95.0 + number, 100.0), ("ttft_128", 0.036, 0.030)):
            for side, value in (("ours", ours), ("vllm", theirs)):
                store.write(reach_report.round_name(cells[name], side, number), {"value": value, "budget": 512})
    contests = {one.name: (list(one.cells), one.ours, one.theirs) for one in reach.CONTESTS}
    reach_report.write_report(tmp_path, store, contests, Results(Store(tmp_path / "real")))
    text = (tmp_path / "report.md").read_text()
    assert "| 1 client, output tokens/s | 97 (512) | 100 (512) | 0.97 | >= 0.95 | met |" in text
    assert "| TTFT of 128 tokens alone, ms | 36 (512) | 30 (512) | 1.20 | <= 1.1 | **missed** |" in text
    assert "| 8 clients, output tokens/s | - | - | - | >= 0.95 | not measured |" in text
    assert "code, tight TPOT | - | - | - | >= 1.3 | not measured |" in text


def test_the_best_budget_is_the_fastest_or_the_one_with_most(tmp_path: Path) -> None:
    store = Store(tmp_path)
    more = reach_report.Cell("whole", "a", "tokens/s", least=1.0)
    less = replace(more, name="b", least=None, most=1.0)
    for budget, value in ((256, 2.0), (512, 1.0), (1024, 2.04)):
        for cell in (more, less):
            store.write(reach_report.tune_name(cell, "ours", budget), {"value": value})
    assert reach_report.best_budget(store, more, "ours", (512, 256, 1024)) == 256
    assert reach_report.best_budget(store, less, "ours", (512, 256, 1024)) == 512
    assert reach_report.best_budget(store, more, "ours", (1024, 256, 512)) == 1024


def predicted(contender: str, rate: float, budget: int = 512) -> dict[str, Any]:
    workload = WORKLOADS["chat"].spec(60, seed=1).at(rate)
    assert workload.arrivals is not None
    lengths = zip(workload.arrivals, workload.prompt_lens, workload.output_lens, strict=True)
    requests = Requests.measured(
        [
            {
                "scheduled": float(arrival),
                "prompt_len": int(prompt),
                "output_len": int(output),
                "status": "timeout",
                "ttft": None,
                "tpot": None,
                "latency": None,
            }
            for arrival, prompt, output in lengths
        ]
    )
    run = {"workload": "chat", "budget": budget, "warmup": 0.0, "requests": requests.to_json()}
    profile = ProfileLatencyModel.read(PROFILE)
    return predict(profile, CONTENDERS[contender], run)


@pytest.mark.parametrize("contender", ["disaggregated", "mixed-x2"])
def test_a_prediction_is_of_the_requests_that_were_sent_whatever_became_of_them(contender: str) -> None:
    little, much = predicted(contender, 1.0), predicted(contender, 60.0)
    assert little["attainments"][1] == pytest.approx(1.0, abs=0.05)
    assert much["attainments"][1] < 0.7
    assert little["ttft_p50"] < much["ttft_p50"]
    assert little["tpot_p90"] < much["tpot_p90"]


def test_a_prediction_knows_the_token_budget() -> None:
    assert predicted("mixed-x2", 4.0, budget=128)["ttft_p90"] != predicted("mixed-x2", 4.0, budget=512)["ttft_p90"]


def test_measurements_of_another_processor_are_not_gone_on_with(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps({"cpu": "another"}))
    options = argparse.Namespace(output_dir=tmp_path, logs=None, model=tmp_path, vllm=tmp_path)
    with pytest.raises(SystemExit, match="another processor"), prepared("benchmarks.goodput.real", options):
        pass
    assert json.loads((tmp_path / "machine.json").read_text()) == {"cpu": "another"}
