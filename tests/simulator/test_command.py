"""``distserve simulate`` from files to figures, timelines, plots and traces."""

import csv
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Fixed
from distserve.bench.workload import WorkloadSpec
from distserve.cluster.profile_file import write_profile
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import LinearStepTime
from distserve.core.profile import FORMAT, ClusterCosts, Profile, ShapeProfile, StepFit, Surface, Table
from simulator.command import simulate
from simulator.load import BatchRecorder
from simulator.model import ClusterModel, InstanceModel
from simulator.plots import plot_load
from simulator.simulation import Fault, FaultKind
from simulator.simulation import simulate as simulate_run
from simulator.summary import SCHEMA
from simulator.timeline_file import COLUMNS

MODEL: dict[str, Any] = {
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
    "slo": {"ttft": 0.3, "tpot": 0.1, "attainment": 0.9},
    "workload": {
        "prompt": {"lognormal": {"mean": 400, "cv": 0.8, "max": 1500}},
        "output": {"lognormal": {"mean": 40, "cv": 0.5, "max": 200}},
        "arrivals": {"rate": 4, "cv": 1},
    },
    "cluster": {
        "gpu": "a100-80g-sxm",
        "nodes": 2,
        "gpus_per_node": 4,
        "intra_node_bandwidth": 300e9,
        "inter_node_bandwidth": 3e9,
    },
    "placement": {
        "prefill": {"instances": 1, "tp": 2, "gpus": [[[0, 0], [0, 1]]]},
        "decode": {"instances": 2, "pp": 2, "gpus": [[[0, 2], [0, 3]], [[1, 0], [1, 1]]]},
    },
    "engine": {"dtype": "bfloat16", "max_batch_tokens": 2048},
}

Run = Callable[..., Result]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the configuration with sections replaced, None taking one away; returns its path."""

    def write_config(name: str = "service.yaml", **sections: Any) -> Path:
        (tmp_path / "opt-13b.json").write_text(json.dumps(MODEL))
        data = {key: value for key, value in {**CONFIG, **sections}.items() if value is not None}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write_config


def run(config: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(simulate, [str(config), *arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(config: Path, *arguments: str) -> str:
    result = CliRunner().invoke(simulate, [str(config), *arguments])
    assert result.exit_code == 1, result.output
    return result.output


def test_prompts_of_a_trace_share_the_prefixes_it_names(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000 * at, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2 + at]}
        for at in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for caching in (False, True):
        workload = {"trace": "trace.jsonl"}
        config = write(workload=workload, engine={**CONFIG["engine"], "prefix_caching": caching})
        instances = json.loads(run(config, "--json").stdout)["summary"]["instances"]
        # Two Mooncake blocks of 512 tokens, each 32 of the instances' blocks.
        hits = [figures["num_hit_tokens"] for figures in instances]
        assert hits == [3 * 1024 * caching, 3 * 1024 * caching, 0]
        text = " ".join(run(config).output.split())
        assert ("3,072 of 4,800 tokens (64.0%) were there and not computed again" in text) == caching
        assert ("3,072 of 4,800 tokens (64.0%) were there and not pulled again" in text) == caching
        assert ("prefixes are not used" in text) != caching


def figures(config: Path, *arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(config, "--requests", "120", "--json", *arguments).stdout)
    assert document["schema"] == SCHEMA
    return document


def test_the_figures_say_what_happened(write: Callable[..., Path]) -> None:
    document = figures(write())
    summary = document["summary"]
    assert summary["num_offered"] == summary["num_answered"] == 120
    assert summary["offered_rate"] == pytest.approx(4, rel=0.3)
    assert summary["attainment"]["low"] <= summary["attainment"]["both"] <= summary["attainment"]["high"]
    names = [instance["instance_id"] for instance in summary["instances"]]
    assert names == ["prefill-0", "decode-0", "decode-1"]
    # With room on its own node, a prefill instance's KV does not cross the network cards: decode-1 is not needed.
    busy = [instance["busy"] for instance in summary["instances"]]
    assert 0 < min(busy[:2]) <= max(busy[:2]) < 1
    assert busy[2] == 0
    assert all(0 < instance["peak_kv"] <= 1 for instance in summary["instances"][:2])
    assert summary["migration"]["num"] > 100
    assert {link["name"].split("/")[0] for link in summary["links"]} == {"node0"}
    assert "a100-80g-sxm" in document["run"]["latency_source"]


def test_the_same_options_give_the_same_files(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    for name in ("one", "two"):
        run(config, "--requests", "60", "--timelines", str(tmp_path / f"{name}.csv.gz"))
    assert (tmp_path / "one.csv.gz").read_bytes() == (tmp_path / "two.csv.gz").read_bytes()
    run(config, "--requests", "60", "--seed", "1", "--timelines", str(tmp_path / "two.csv.gz"))
    assert (tmp_path / "one.csv.gz").read_bytes() != (tmp_path / "two.csv.gz").read_bytes()


def test_csv_and_parquet_hold_the_timelines_that_the_figures_are_of(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    summary = figures(config, "--csv", str(tmp_path / "r.csv.gz"), "--parquet", str(tmp_path / "r.parquet"))["summary"]
    with gzip.open(tmp_path / "r.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "r.parquet")
    assert tuple(rows[0]) == tuple(table.column_names) == COLUMNS
    assert table.schema.metadata[b"schema"] == b"distserve-timelines/1"
    for name in COLUMNS:
        assert [row[name] for row in rows] == ["" if v is None else str(v) for v in table[name].to_pylist()]
    ttft = np.array([float(row["first_token"]) - float(row["arrival"]) for row in rows])
    assert np.median(ttft) == pytest.approx(summary["ttft"]["p50"], abs=1e-5)
    for row in rows:
        times = [float(row[name]) for name in ("arrival", "prefill_start", "prefill_end", "first_token", "finish")]
        assert times == sorted(times)
        if row["migration_end"]:
            assert float(row["migration_start"]) <= float(row["migration_end"]) <= float(row["decode_start"]) + 1e-6
            assert row["decode_instance"] in {"decode-0", "decode-1"}


def test_the_chrome_trace_has_every_stage_pull_and_link(write: Callable[..., Path], tmp_path: Path) -> None:
    summary = figures(write(), "--perfetto", str(tmp_path / "trace.json"))["summary"]
    events = json.loads((tmp_path / "trace.json").read_text())
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    steps: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            steps[processes[event["pid"]].split(" ")[0], event["tid"] - 1].append(event)
    for instance in summary["instances"]:
        for stage in range(instance["pp"]):
            found = sorted(steps[instance["instance_id"], stage], key=lambda event: event["ts"])
            assert len(found) == instance["num_steps"]
            ends = [event["ts"] + event["dur"] for event in found]
            assert all(end <= later["ts"] + 0.01 for end, later in zip(ends, found[1:], strict=False))
    assert set(steps) == {(i["instance_id"], s) for i in summary["instances"] for s in range(i["pp"])}
    phases = Counter(event["ph"] for event in events)
    assert phases["b"] == phases["e"] == summary["migration"]["num"]
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {link["name"] for link in summary["links"]}
    # What the counters carry is what the links carried.
    for link in summary["links"]:
        points = [(e["ts"], e["args"]["GB/s"]) for e in events if e["ph"] == "C" and e["name"] == link["name"]]
        carried = sum(level * (until - since) * 1e3 for (since, level), (until, _) in pairwise(points))
        assert carried == pytest.approx(link["num_bytes"], rel=0.02)


def test_no_link_is_shown_to_carry_more_than_it_can(write: Callable[..., Path], tmp_path: Path) -> None:
    """Pulls that wait for their turn, or share a card, are under way for longer than their bytes flow."""
    placement = {
        "prefill": {"instances": 2, "gpus": [[[0, 0]], [[0, 1]]]},
        "decode": {"instances": 2, "gpus": [[[1, 0]], [[1, 1]]]},
    }
    config = write(placement=placement, cluster=CONFIG["cluster"] | {"inter_node_bandwidth": 1e9})
    summary = figures(config, "--rate", "8", "--perfetto", str(tmp_path / "trace.json"))["summary"]
    counters = [e for e in json.loads((tmp_path / "trace.json").read_text()) if e["ph"] == "C"]
    loads = {
        name: [e["args"]["GB/s"] for e in counters if e["name"] == name] for name in ("node0/nic0 out", "node1/nic0 in")
    }
    for link in summary["links"]:
        assert max(loads[link["name"]]) == pytest.approx(link["capacity"] / 1e9, rel=1e-3)
        assert loads[link["name"]][-1] == 0
    assert summary["migration"]["max"] > 2 * summary["migration"]["p50"], "some wait"


def test_plots_are_written(write: Callable[..., Path], tmp_path: Path) -> None:
    run(write(), "--requests", "60", "--plot", str(tmp_path / "plots"), "--fault", "3:loss:decode-0")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"latency.png", "load.png"}


def test_a_plot_of_a_run_with_resubmitted_requests_says_what_it_leaves_out() -> None:
    requests = WorkloadSpec(Gamma(), Fixed(100), Fixed(40), num_requests=60, seed=3).at(10.0)
    model = ClusterModel(
        tuple(
            InstanceModel(
                InstanceSpec(name, Role.MIXED, KvConfig(500), SchedulerConfig()), LinearStepTime(0.01, 1e-4, 0, 0)
            )
            for name in ("mixed-0", "mixed-1")
        )
    )
    for faults in ((), (Fault(2.0, FaultKind.LOSS, "mixed-1"),)):
        figure = plot_load(simulate_run(model, requests, faults=faults), model, BatchRecorder(), "a run", faults)
        texts = [figure.axes[2].get_ylabel(), *(t.get_text() for t in figure.axes[0].get_legend().get_texts())]
        assert any("came again, and wait" in text for text in texts) == bool(faults)
        assert ("in their last attempts" in texts[0]) == bool(faults)


def test_a_placement_of_another_file_and_of_a_plan_the_file_names(write: Callable[..., Path]) -> None:
    colocated = {"mixed": {"instances": 3, "max_batch_tokens": 512, "kv_tokens": 20000}}
    other = write("plan.yaml", placement=colocated)
    for document in (
        figures(write(), "--placement", str(other)),
        figures(write(placement="plan.yaml")),
    ):
        instances = document["summary"]["instances"]
        assert [instance["instance_id"] for instance in instances] == ["mixed-0", "mixed-1", "mixed-2"]
        assert [instance["gpus"] for instance in instances] == [[[0, 0]], [[0, 1]], [[0, 2]]]
        assert {instance["num_kv_blocks"] for instance in instances} == {1250}


def test_mixed_instances_never_split_prompts_if_told_so(write: Callable[..., Path]) -> None:
    rates = []
    for policy in ("splitfuse", "whole"):
        config = write(placement={"mixed": {"instances": 1}}, engine={"mixed_policy": policy, "max_batch_tokens": 128})
        summary = figures(config, "--rate", "2", "--requests", "60")["summary"]
        assert summary["num_answered"] == 60
        rates.append(summary["tpot"]["p99"])
    assert rates[1] > 1.2 * rates[0], "decoding waits for whole prompts"


def test_a_lost_instance_shows(write: Callable[..., Path]) -> None:
    config = write()
    before, after = figures(config), figures(config, "--fault", "5:loss:decode-1", "--fault", "9:loss:decode-0")
    assert before["summary"]["num_failed"] == 0
    assert after["summary"]["failures"].keys() == {"503"}
    assert after["summary"]["num_answered"] < after["summary"]["num_offered"]


def test_a_fault_after_the_end_changes_nothing(write: Callable[..., Path]) -> None:
    config = write()
    assert figures(config, "--fault", "1e6:drain:decode-1")["summary"] == figures(config)["summary"]


def test_an_instance_changes_its_role(write: Callable[..., Path]) -> None:
    config = write()
    summary = figures(config, "--fault", "5:mixed:decode-1")["summary"]
    assert summary["num_answered"] == summary["num_offered"]
    assert "mixed" in {instance["role"] for instance in summary["instances"] if instance["instance_id"] == "decode-1"}
    both = ("--fault", "5:prefill:decode-1", "--fault", "9:prefill:decode-0")
    assert "decode-0 is the last decode instance" in " ".join(refused(config, *both).split())


def test_an_instance_that_starts_late_serves_from_then_on(write: Callable[..., Path], tmp_path: Path) -> None:
    run(write(), "--requests", "120", "--fault", "9:start:decode-0", "--timelines", str(tmp_path / "r.csv"))
    with (tmp_path / "r.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["decode_instance"] == "decode-0"]
    assert rows
    assert min(float(row["decode_start"]) for row in rows) > 9


def test_rate_duration_and_warmup(write: Callable[..., Path]) -> None:
    config = write()
    fast = json.loads(run(config, "--rate", "8", "--duration", "20", "--json").stdout)["summary"]
    assert fast["num_offered"] == pytest.approx(160, rel=0.25)
    cut = json.loads(run(config, "--rate", "8", "--duration", "20", "--warmup", "10", "--json").stdout)["summary"]
    assert cut["num_offered"] == pytest.approx(fast["num_offered"] / 2, rel=0.3)


def test_a_trace_is_replayed_at_its_own_times(write: Callable[..., Path], tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{second:02d}.0000000,{100 + second},{second + 1}" for second in range(30)]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    config = write(workload={"trace": "trace.csv"})
    summary = json.loads(run(config, "--json").stdout)["summary"]
    assert summary["num_offered"] == 30
    assert summary["offered_rate"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sections", "arguments", "words"),
    [
        ({"placement": None}, (), ["names no instances", "distserve plan"]),
        ({"placement": "auto"}, (), ["names no instances"]),
        ({}, ("--fault", "1:boom:decode-0"), ["boom", "start, loss, drain"]),
        ({}, ("--fault", "1:loss:decode-7"), ["decode-7", "decode-0, decode-1"]),
        ({}, ("--fault", "later:loss:decode-0"), ["seconds", "later"]),
        ({}, ("--fault", "loss"), ["TIME:KIND:INSTANCE"]),
        ({}, ("--fault", "5:loss:decode-0", "--fault", "9:loss:decode-0"), ["9:loss:decode-0", "only start"]),
        ({}, ("--fault", "9:drain:decode-0", "--fault", "5:loss:decode-0"), ["9:drain:decode-0", "lost by then"]),
        ({}, ("--fault", "5:drain:decode-0", "--fault", "9:start:decode-0"), ["9:start:decode-0", "runs by then"]),
        ({}, ("--timelines", "r.txt"), [".parquet"]),
        ({"cluster": CONFIG["cluster"] | {"inter_node_bandwidth": -1}}, (), ["inter_node_bandwidth", "greater than 0"]),
        ({"cluster": CONFIG["cluster"] | {"gpu": "a100-80g-sxn"}}, (), ["a100-80g-sxm"]),
        ({"cluster": CONFIG["cluster"] | {"gpus": 3}}, (), ["cluster.gpus", "unknown"]),
        ({"workload": {"trace": "absent.csv"}}, (), ["absent.csv"]),
        ({"workload": CONFIG["workload"] | {"arrivals": {"cv": 1}}}, (), ["--rate"]),
        ({"placement": {"prefill": {"tp": 3}, "decode": {}}}, (), ["tp 3"]),
        ({"placement": {"prefill": {"instances": 9}, "decode": {}}}, (), ["10 GPUs", "2 nodes of 4"]),
        ({"cluster": CONFIG["cluster"] | {"gpu": "l4"}, "placement": {"mixed": {}}}, (), ["no room for KV"]),
        ({"placement": {"mixed": {"max_batch_tokens": 32}}}, (), ["mixed-0", "max_batch_size = 64", "32 or less"]),
        (
            {"engine": CONFIG["engine"] | {"prefix_caching": True, "prefix_cache_tokens": 10**9}},
            (),
            ["1000000000 tokens does not fit prefill-0"],
        ),
        ({"engine": {"max_batch_tokens": 8}}, (), ["prefill-0", "smaller than a KV block of 16 tokens"]),
        ({"engine": {"mixed_policy": "first"}}, (), ["engine.mixed_policy", "'splitfuse' or 'whole'"]),
    ],
)
def test_mistakes_are_said_with_what_would_be_right(
    write: Callable[..., Path], sections: dict[str, Any], arguments: tuple[str, ...], words: list[str]
) -> None:
    message = refused(write(**sections), *arguments)
    for word in words:
        assert word in message


def test_kv_tokens_are_rounded_up_to_blocks_as_a_launch_does(write: Callable[..., Path]) -> None:
    instances = figures(write(engine={"kv_tokens": 250}), "--requests", "5")["summary"]["instances"]
    assert {instance["num_kv_blocks"] for instance in instances} == {16}


def test_a_malformed_trace_is_refused_with_its_line(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,many,44\n")
    assert "trace.csv:2" in refused(write(workload={"trace": "trace.csv"}))


def test_a_plan_for_another_cluster_is_refused(write: Callable[..., Path]) -> None:
    plan = write("plan.yaml", cluster=CONFIG["cluster"] | {"gpu": "h100-sxm"})
    message = refused(write(), "--placement", str(plan))
    assert "h100-sxm" in message
    assert "a100-80g-sxm" in message


def test_a_failed_run_leaves_no_file(write: Callable[..., Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    before = {path.name for path in tmp_path.iterdir()} | {"service.yaml", "opt-13b.json"}
    refused(write(), "--perfetto", str(trace), "--timelines", str(tmp_path / "nowhere" / "r.csv"))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_without_a_rate_the_one_that_was_planned_for_counts(write: Callable[..., Path]) -> None:
    plan = write("plan.yaml", prediction={"rate": 6.5})
    config = write(workload=CONFIG["workload"] | {"arrivals": {"cv": 1}})
    assert figures(config, "--placement", str(plan))["run"]["rate"] == 6.5
    assert figures(config, "--placement", str(plan), "--rate", "2")["run"]["rate"] == 2


def test_instances_that_share_a_host_are_as_its_profile_says(write: Callable[..., Path], tmp_path: Path) -> None:
    fit = StepFit(Surface((1, 512), (1, 1024), ((0.01, 0.02), (0.1, 0.2))), Table((1, 64), (0.01, 0.05)), 0, 0, 0, 0, 0)
    costs = ClusterCosts(1e-3, 1e-5, 5e-4, 2e-3, 1e-5, 3e-4, 1e-3, 1e-9, 1e-3, 1e-6, 1e-4, 1e-5, 0.1)
    # Fewer cores than instances: what they compute at the same time takes longer.
    for cores in (2, 8):
        machine: dict[str, str | int | float] = {"cpu": "a processor", "cores": cores}
        profile = Profile(
            FORMAT, "", machine, "tiny", "", "float32", 1, 16, 2048, {}, (ShapeProfile(ParallelConfig(), fit),), costs
        )
        write_profile(profile, tmp_path / f"{cores}.json")
    config = write(
        cluster=CONFIG["cluster"] | {"gpu": "cpu", "nodes": 1},
        placement={"prefill": {}, "decode": {"instances": 3}},
        engine={"kv_tokens": 8192},
    )
    few, many = (
        figures(config, "--profile", str(tmp_path / f"{cores}.json"), "--perfetto", str(tmp_path / "trace.json"))
        for cores in (2, 8)
    )
    assert few["summary"]["tpot"]["mean"] > 1.02 * many["summary"]["tpot"]["mean"]
    assert few["summary"]["num_answered"] == 120
    assert any("cores with client" in note for note in few["run"]["notes"])
    assert not any("several ranks" in note for note in few["run"]["notes"])
    assert json.loads((tmp_path / "trace.json").read_text())


def test_instances_of_several_ranks_share_a_host_as_measured(write: Callable[..., Path], tmp_path: Path) -> None:
    fit = StepFit(Surface((1, 512), (1, 1024), ((0.01, 0.02), (0.1, 0.2))), Table((1, 64), (0.01, 0.05)), 0, 0, 0, 0, 0)
    shapes = (
        ShapeProfile(ParallelConfig(), fit),
        ShapeProfile(ParallelConfig(2, 2), fit, through=fit.raised(0.03, 0.0)),
    )
    costs = ClusterCosts(*(0.0 for _ in range(13)))
    profile = Profile(FORMAT, "", {"cores": 8}, "tiny", "", "float32", 1, 16, 2048, {}, shapes, costs)
    write_profile(profile, tmp_path / "profile.json")
    cluster = CONFIG["cluster"] | {"gpu": "cpu", "nodes": 1, "gpus_per_node": 8}
    config = write(cluster=cluster, placement={"prefill": {"tp": 2, "pp": 2}, "decode": {}}, engine={"kv_tokens": 8192})
    found = figures(config, "--profile", str(tmp_path / "profile.json"))
    assert found["summary"]["num_answered"] == 120
    assert any("several ranks are predicted roughly" in note for note in found["run"]["notes"])
    config = write(cluster=cluster, placement={"prefill": {"tp": 2}, "decode": {}}, engine={"kv_tokens": 8192})
    message = refused(config, "--profile", str(tmp_path / "profile.json"))
    assert "distserve profile MODEL --shape 1x1 --shape 2x2 --shape 2x1" in message


def test_overload_is_said(write: Callable[..., Path]) -> None:
    config = write()
    for rate, grows in (("4", False), ("100", True)):
        assert ("backlog grows" in run(config, "--rate", rate, "--requests", "400").stdout) == grows
