"""Whatever is wrong ends with a sentence that says where, and what would be valid; nothing is left half-written."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distserve.bench.traces import read_trace
from placement.command import plan
from placement.launch import launch
from tests.placement.conftest import OPT_13B, WriteConfig

TRACE = {"prompt": None, "output": None, "arrivals": None, "trace": "trace.csv"}
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def refused(config: Path, *arguments: str) -> str:
    """What the command says of ``config``; it must have failed with a message, and written nothing."""
    before = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    out = [
        "--output",
        str(config.parent / "plan.yaml"),
        "--plot",
        str(config.parent / "plots"),
        "--jobs",
        "1",
        "--quick",
    ]
    result = CliRunner().invoke(plan, [str(config), *out, *arguments])
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    after = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    assert after == before
    assert not (config.parent / "plots").exists()
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # An objective that no placement reaches: the constraint, the best reachable value, what would help.
        ({"slo": {"ttft": 0.001}}, ["(ttft)", "even a lone prompt takes 0.", "A TTFT of at least 0.", "faster GPUs"]),
        ({"slo": {"tpot": 0.0001}}, ["(tpot)", "s per token", "A TPOT of at least 0.0", "memory bandwidth"]),
        # More than the cluster can compute.
        (
            {"workload": {"arrivals": {"rate": 100_000}}},
            ["(rate)", "100000 requests/s exceed what 2 GPUs can compute", "More GPUs or a lower rate would help."],
        ),
        # A model that fits on no shape.
        (
            {"cluster": {"gpu": "l4", "gpus_per_node": 1}},
            ["(memory)", "opt-13b fits no shape on 1 x 1 l4", "GB of weights per GPU", "GPUs with more memory"],
        ),
        (
            {"cluster": {"gpu": "l4", "gpus_per_node": 2}, "engine": {"kv_tokens": 400_000}},
            ["(memory)", "13 GB of weights per GPU leave no room for the KV memory asked for"],
        ),
        # Steps in which no prompt is computed: only decode instances could be.
        (
            {"engine": {"max_batch_tokens": 8}},
            ["(batch)", "a step of max_batch_tokens = 8 is smaller than a KV block of 16 tokens", "to 16 or more"],
        ),
        # A shape that cannot be.
        (
            {"placement": {"prefill": {"tp": 3}, "decode": {"tp": 1}}, "cluster": {"gpus_per_node": 4}},
            ["tp 3", "40 query heads", "1, 2, 4, 5, 8, 10, 20, 40"],
        ),
        ({"placement": {"prefill": {"tp": 8}, "decode": {}}}, ["placement.prefill", "wider than a node"]),
        # GPUs and links.
        ({"cluster": {"gpu": "a100-80gb"}}, ["unknown GPU 'a100-80gb'", "Did you mean a100-80g-sxm or a100-80g-pcie"]),
        ({"cluster": {"gpu": "h100"}}, ["unknown GPU 'h100'", "h100-pcie or h100-sxm"]),
        ({"cluster": {"intra_node_bandwidth": -1}}, ["line 24: cluster.intra_node_bandwidth", "-1", "greater than 0"]),
        ({"cluster": {"inter_node_bandwidth": 0}}, ["cluster.inter_node_bandwidth", "greater than 0"]),
        ({"cluster": {"inter_node_bandwidth": None}}, ["cluster.inter_node_bandwidth is missing"]),
        ({"cluster": {"nodes": 0}}, ["cluster.nodes", "greater than or equal to 1"]),
        # Keys nobody knows.
        ({"clutser": {}}, ["clutser is unknown", "cluster"]),
        ({"cluster": {"gpus": 4}}, ["cluster.gpus is unknown; known here:", "gpus_per_node"]),
        ({"workload": {"arivals": {}}}, ["workload.arivals is unknown", "arrivals"]),
        ({"workload": {"arrivals": {"rates": 3}}}, ["workload.arrivals.rates is unknown; known here: cv, rate"]),
        # Lengths that are none.
        ({"workload": {"prompt": None}}, ["prompt missing", "lognormal"]),
        ({"workload": {"prompt": {"lognormal": {"mean": 100}}}}, ["workload.prompt", "one of sigma and cv"]),
        ({"workload": {"prompt": {"lognormal": {"mean": 9, "cv": 1, "maximum": 3}}}}, ["no 'maximum'", "and max"]),
        ({"workload": {"prompt": {"pareto": {"mean": 9}}}}, ["workload.prompt: a length is a number of tokens"]),
        ({"workload": {"prompt": -5}}, ["workload.prompt", "'-5'"]),
        ({"workload": {"prompt": {"normal": {"mean": "many", "std": 1}}}}, ["mean must be a number", "'many'"]),
        ({"workload": {"arrivals": {"rate": -2}}}, ["workload.arrivals.rate", "-2", "greater than 0"]),
        # Sections that are missing.
        ({"slo": None}, ["planning needs the section slo", "ttft: 0.4"]),
        ({"cluster": "eight"}, ["planning needs the section cluster"]),
        ({"model": "no-such-model"}, ["config.json", "no-such-model"]),
        # Step times from a file.
        ({"cluster": {"profile": "gone.json"}}, ["cannot read", "gone.json"]),
        ({"cluster": {"latency": "profile"}}, ["need --profile FILE", "distserve profile"]),
        ({"cluster": {"latency": "guess"}}, ["cluster.latency", "'analytic'"]),
    ],
)
def test_mistakes_end_with_a_sentence(write_config: WriteConfig, changes: dict[str, Any], expected: list[str]) -> None:
    message = refused(write_config(**changes))
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "trace.csv: not recognised as a trace"),
        (HEADER, "trace.csv: the trace holds no request"),
        (HEADER + "2023-11-16 18:15:46.0,374,44\n2023-11-16 18:15:47.0,many,44\n", "trace.csv:3: ContextTokens"),
        (HEADER + "2023-11-16 18:15:46.0,374\n", "trace.csv:2: 2 fields where the header has 3"),
        (HEADER + "yesterday,374,44\n", "trace.csv:2: TIMESTAMP 'yesterday'"),
        (HEADER + "2023-11-16 18:15:46.0,374,-44\n", "trace.csv:2: GeneratedTokens must be a whole number"),
        (HEADER + f"2023-11-16 18:15:46.0,{10**30},44\n", "trace.csv:2: ContextTokens must be a whole number"),
        (HEADER + "2023-11-16 18:15:46.0,374,44\n" * 3, "arrive at once"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": \n', "trace.csv:2: not JSON"),
    ],
)
def test_traces_that_are_none(write_config: WriteConfig, tmp_path: Path, content: str, expected: str) -> None:
    config = write_config(workload=TRACE)
    (tmp_path / "trace.csv").write_text(content)
    assert expected in refused(config)


def test_a_trace_that_is_not_there(write_config: WriteConfig) -> None:
    assert "cannot read the trace trace.csv" in refused(write_config(workload=TRACE))


def test_a_long_trace_is_streamed(tmp_path: Path) -> None:
    num = 60_000
    path = tmp_path / "trace.csv"
    with path.open("w") as file:
        file.write(HEADER)
        for number in range(num):
            file.write(f"2023-11-16 {number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}.0,374,44\n")
    read_trace(path)  # what the first call imports and keeps is not the trace's
    tracemalloc.start()
    trace = read_trace(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(trace) == num
    # Three columns of eight bytes, a copy while they are put in order; lists of numbers would take twice as much.
    assert peak < 75 * num


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    config = tmp_path / "service.yaml"
    assert "cannot read" in refused(config)
    config.write_text("slo: [1, 2\n")
    assert "not valid YAML" in refused(config)
    config.write_text("just words")
    assert "expected keys and values" in refused(config)


def test_a_model_with_a_damaged_config(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    (tmp_path / "opt-13b.json").write_text("{")
    assert "not valid JSON" in refused(config)
    (tmp_path / "opt-13b.json").write_text(json.dumps(OPT_13B | {"num_attention_heads": None}))
    assert "num_attention_heads" in refused(config)


def test_a_place_to_write_is_checked_before_the_search(write_config: WriteConfig) -> None:
    config = write_config()
    assert "cannot write into" in refused(config, "--output", str(config.parent / "missing" / "plan.yaml"))
    assert "would replace CONFIG itself" in refused(config, "--output", str(config))
    assert "cannot write into" in refused(config, "--plot", str(config.parent / "missing" / "plots"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("tp=3", "tp 3"),
        ("tp=two", "'tp=two' is not one of tp=N"),
        ("batch=4", "'batch=4' is not one of"),
        ("prefill=0", "'prefill=0'"),
    ],
)
def test_steps_that_cannot_be_explained(write_config: WriteConfig, shape: str, expected: str) -> None:
    assert expected in refused(write_config(), "--explain-latency", shape)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--exit-after-bench", "--no-bench"), "--no-bench has none: drop one"),
        (("--exit-after-bench",), "has no load to send and to compare with"),
        (("--wait-for-nodes", "600"), "for the nodes of a cluster that is joined: give serving.ray_address"),
    ],
)
def test_a_launch_that_could_not_do_what_is_asked_is_refused_before_it_starts(
    tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    config = tmp_path / "service.yaml"
    config.write_text("placement: {mixed: {instances: 1}}\n")
    result = CliRunner().invoke(launch, [str(config), "--port", "0", *arguments])
    assert result.exit_code
    assert expected in " ".join(result.output.split())
    assert "Traceback" not in result.output
