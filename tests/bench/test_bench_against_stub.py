"""The whole command against a stub server whose delays are known, in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from distserve.bench.command import bench

Start = Callable[..., str]
MILLISECONDS = 1e-3
TOLERANCE = 5 * MILLISECONDS


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, [str(argument) for argument in arguments])


def measure(tmp_path: Path, *arguments: object, expect: int = 0) -> dict[str, Any]:
    path = tmp_path / "result.json"
    result = run(*arguments, "--output", path)
    assert result.exit_code == expect, result.output
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["schema"] == "distserve-bench/1"
    return document


@pytest.mark.parametrize(
    "flags",
    [(), ("--chat",), ("--prompt-text",), ("--plain",)],
    ids=["token ids", "chat", "text", "plain"],
)
def test_latencies_are_the_stubs_within_5_ms(start_stub: Start, tmp_path: Path, flags: tuple[str, ...]) -> None:
    url = start_stub(ttft=0.06, itl=0.02, vocab_size=100, template_tokens=7)
    expected = {"ttft": 0.06, "tpot": 0.02, "itl": 0.02, "latency": 0.06 + 9 * 0.02}
    arguments = (url, "--rate", 12, "--num-requests", 12, "--output-len", 10, *flags)
    for attempt in range(5):
        summary = measure(tmp_path, *arguments, "--seed", attempt)["runs"][0]["summary"]
        assert summary["num_ok"] == 12
        assert summary["mean_prompt_tokens"] == pytest.approx(256)
        assert summary["mean_output_tokens"] == 10
        medians = {name: summary[name]["p50"] for name in expected}
        # On a machine busy with other work the stub itself is late: it then takes a quiet second.
        if medians == pytest.approx(expected, abs=TOLERANCE):
            break
    assert medians == pytest.approx(expected, abs=TOLERANCE)


def test_an_event_may_carry_several_tokens(start_stub: Start, tmp_path: Path) -> None:
    url = start_stub(ttft=0.05, itl=0.06, tokens_per_event=4)
    arguments = (url, "--clients", 2, "--num-requests", 8, "--output-len", 12, "--token-times")
    summary = measure(tmp_path, *arguments)["runs"][0]["summary"]
    assert summary["tpot"]["p50"] == pytest.approx(2 * 0.06 / 11, abs=TOLERANCE)
    assert summary["itl"]["p50"] == pytest.approx(0.06, abs=TOLERANCE)
    assert summary["count_sources"] == {"usage": 8}


def test_tokens_are_counted_from_ids_or_events_without_usage(start_stub: Start, tmp_path: Path) -> None:
    load = ("--clients", 2, "--num-requests", 4, "--output-len", 12)
    ids = measure(tmp_path, start_stub(tokens_per_event=4, no_usage=True), *load, "--token-times")["runs"][0]
    assert ids["summary"]["mean_output_tokens"] == 12
    assert ids["summary"]["count_sources"] == {"token_ids": 4}
    assert ids["requests"][0]["event_tokens"] == [4, 4, 4]
    events = measure(tmp_path, start_stub(no_usage=True, no_token_ids=True), *load)["runs"][0]["summary"]
    assert (events["mean_output_tokens"], events["count_sources"]) == (12, {"events": 4})


def test_waiting_for_the_server_counts_from_the_schedule(start_stub: Start, tmp_path: Path) -> None:
    # One request takes the server 0.1 s; 10 arrive in a millisecond. A closed-loop view would see 0.1 s each.
    url = start_stub(ttft=0.1, itl=0.001, service=0.1)
    arguments = (url, "--rate", 10_000, "--num-requests", 10, "--output-len", 2, "--slo-ttft", 0.55, "--seed", 1)
    document = measure(tmp_path, *arguments)
    summary = document["runs"][0]["summary"]
    assert summary["ttft"]["max"] == pytest.approx(1.0, abs=0.05)
    assert summary["ttft"]["p50"] == pytest.approx(0.55, abs=0.05)
    assert summary["attainment"]["both"] == 0.5
    assert document["slo"] == {"ttft": 0.55, "tpot": None, "attainment": 0.9}


def test_shed_and_broken_requests_are_missed(start_stub: Start, tmp_path: Path) -> None:
    # The two trial requests are the first that the stub counts.
    url = start_stub(ttft=0.005, itl=0.001, shed_every=5, break_every=4)
    arguments = (url, "--clients", 1, "--num-requests", 20, "--output-len", 4, "--slo-ttft", 1, "--slo-tpot", 1)
    document = measure(tmp_path, *arguments)
    summary = document["runs"][0]["summary"]
    numbers = range(3, 23)
    shed = sum(n % 5 == 0 for n in numbers)
    broken = sum(n % 4 == 0 and n % 5 != 0 for n in numbers)
    assert (summary["num_shed"], summary["num_failed"]) == (shed, broken)
    assert summary["attainment"]["both"] == pytest.approx((20 - shed - broken) / 20)
    errors = {request["status"]: request["error"] for request in document["runs"][0]["requests"]}
    assert "HTTP 429" in errors["shed"]
    assert errors["failed"]


def test_a_slow_answer_times_out(start_stub: Start, tmp_path: Path) -> None:
    url = start_stub(ttft=0.01, itl=0.15)
    arguments = (url, "--clients", 2, "--num-requests", 2, "--output-len", 50, "--timeout", 0.5)
    began = time.monotonic()
    document = measure(tmp_path, *arguments, expect=1)
    assert time.monotonic() - began < 5
    assert document["runs"][0]["summary"]["num_timeout"] == 2


def test_a_timeline_from_the_server_is_kept(start_stub: Start, tmp_path: Path) -> None:
    arguments = ("--clients", 1, "--num-requests", 1, "--output-len", 2, "--return-timeline")
    request = measure(tmp_path, start_stub(ttft=0.03), *arguments)["runs"][0]["requests"][0]
    assert request["timeline"] == {"arrival": 0.0, "first_token": 0.03}


def test_a_trace_is_replayed_on_its_own_times(start_stub: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{46 + i}.6805900,{100 * (i + 1)},{2 * (i + 1)}" for i in range(5)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    url = start_stub(ttft=0.005, itl=0.001)
    arguments = (url, "--trace", trace, "--trace-end", 3.5, "--time-scale", 0.1, "--fit-context", 204)
    requests = measure(tmp_path, *arguments)["runs"][0]["requests"]
    assert [request["num_prompt_tokens"] for request in requests] == [50, 100, 150, 200]
    assert [request["num_output_tokens"] for request in requests] == [1, 2, 3, 4]
    assert [request["scheduled"] for request in requests] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(request["sent"] - request["scheduled"] < 0.1 for request in requests)


def test_the_search_finds_a_known_capacity(start_stub: Start, tmp_path: Path) -> None:
    # One server, 50 ms a request: 20/s at most; in an M/D/1 queue 90% wait less than 0.3 s up to about 17/s.
    url = start_stub(ttft=0.05, itl=0.0, service=0.05)
    out = tmp_path / "out"
    arguments = ("--find-goodput", "--slo-ttft", 0.35, "--rate", 10, "--duration", 2, "--output-len", 1)
    result = run(url, *arguments, "--tolerance", 0.25, "--max-probes", 5, "--max-rate", 40, "--output-dir", out)
    assert result.exit_code == 0, result.output
    document = json.loads((out / "result.json").read_text())
    goodput = document["goodput"]
    assert 7 <= goodput["low"] < goodput["high"] <= 40
    assert goodput["low"] < 22
    assert len(goodput["probes"]) == len(document["runs"]) <= 5
    assert all(probe["verdict"] for probe in goodput["probes"])
    assert "goodput" in result.output
    names = {path.name for path in out.iterdir()}
    assert {"result.json", "latency.png", "attainment_over_rate.png", "requests_over_time_00.png"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))


def test_a_rate_that_cannot_be_judged_ends_the_search_and_keeps_what_was_measured(
    start_stub: Start, tmp_path: Path
) -> None:
    arguments = ("--find-goodput", "--slo-ttft", 1, "--rate", 8, "--duration", 3, "--warmup", 1, "--num-requests", 30)
    arguments += ("--arrivals", "gamma", "--cv", 0)
    document = measure(tmp_path, start_stub(), *arguments, "--output-len", 2, expect=1)
    goodput = document["goodput"]
    assert goodput["low"] == 16
    assert re.search(r"at 32/s the last request arrives after 0\.\d s, within the warm-up of 1 s", goodput["reason"])
    assert [probe["run"] for probe in goodput["probes"]] == [0, 1, None]
    assert len(document["runs"]) == 2


def test_a_closed_loop_that_ends_within_its_warm_up_is_an_error(start_stub: Start, tmp_path: Path) -> None:
    arguments = ("--clients", 2, "--num-requests", 4, "--output-len", 2, "--warmup", 30)
    document = measure(tmp_path, start_stub(), *arguments, expect=1)
    assert document["error"].startswith("with 2 clients no request began after the warm-up of 30 s")
    assert document["runs"][0]["summary"]["num_warmup"] == 4


def test_a_pipe_takes_the_result_wherever_it_is(
    start_stub: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, read, access = tmp_path / "pipe", [], os.access
    os.mkfifo(pipe)
    # As /dev is to most users: root may write into any directory.
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path and access(place, mode))
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    load = ("--clients", 1, "--num-requests", 1, "--output-len", 2)
    result = run(start_stub(), *load, "--output", pipe)
    assert result.exit_code == 0, result.output
    reader.join(10)
    assert json.loads(read[0])["runs"][0]["summary"]["num_ok"] == 1
    refused = run("http://127.0.0.1:9", *load, "--output", tmp_path / "result.json")
    assert f"cannot write into {tmp_path}" in refused.output


def test_a_server_that_is_busy_between_two_runs_is_waited_for(start_stub: Start, tmp_path: Path) -> None:
    # Two trials, seven requests: the tenth, which asks whether it is at rest, is shed.
    url = start_stub(shed_every=10)
    document = measure(tmp_path, url, "--rate", "40,40", "--num-requests", 7, "--output-len", 2)
    assert [run["summary"]["num_ok"] for run in document["runs"]] == [7, 7]


def test_a_sweep_draws_attainment_over_rate(start_stub: Start, tmp_path: Path) -> None:
    url = start_stub(ttft=0.005, itl=0.001)
    arguments = ("--rate", "20,40", "--duration", 0.5, "--output-len", 4, "--slo-ttft", 0.1, "--output-dir", tmp_path)
    result = run(url, *arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "attainment_over_rate.png").exists()
    assert [entry["rate"] for entry in json.loads((tmp_path / "result.json").read_text())["runs"]] == [20, 40]


def test_a_server_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        began = time.monotonic()
        result = run(f"http://127.0.0.1:{held.getsockname()[1]}", "--rate", 1)
    assert result.exit_code == 1
    assert "no server at" in result.output
    assert time.monotonic() - began < 3


def test_a_server_that_refuses_our_fields_is_told_from_a_broken_one(start_stub: Start) -> None:
    url = start_stub(strict=True)
    refused = run(url, "--clients", 1, "--num-requests", 1)
    assert refused.exit_code == 1
    assert "unknown field ignore_eos" in refused.output
    assert "--plain" in refused.output
    assert run(url, "--clients", 1, "--num-requests", 1, "--plain").exit_code == 0


def test_a_wrong_model_name_lists_the_right_ones(start_stub: Start) -> None:
    result = run(start_stub(), "--model", "other", "--clients", 1)
    assert (result.exit_code, "it has: stub" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "how much load"),
        (("--rate", "0"), "must be positive"),
        (("--rate", "1", "--clients", "2"), "closed loop"),
        (("--find-goodput",), "--slo-ttft"),
        (("--rate", "1", "--prompt-len", "many"), "a length is"),
        (("--rate", "1", "--time-scale", "2"), "--trace"),
        (("--rate", "1", "--arrivals", "trace"), "--trace with timestamps"),
        (("--rate", "1", "--cv", "2"), "--arrivals gamma"),
        (("--rate", "1", "--duration", "5", "--warmup", "5"), "leaves nothing"),
        (("--rate", "10", "--num-requests", "5", "--warmup", "60"), "within the warm-up of 60 s"),
        (("--rate", "1", "--duration", "inf"), "--duration inf has no end"),
        (("--clients", "1", "--duration", "inf"), "--duration inf has no end"),
        (
            ("--rate", "8,0.01", "--duration", "60", "--arrivals", "gamma", "--cv", "0"),
            "at 0.01/s no request arrives",
        ),
        (("--rate", "1", "--extra-body", "[1]"), "JSON object"),
        (("--trace", "/nowhere/trace.csv"), "cannot read the trace"),
        (("--rate", "1", "--output", "/nowhere/result.json"), "cannot write into /nowhere"),
    ],
)
def test_contradictory_options_are_refused_before_anything_is_sent(arguments: tuple[str, ...], message: str) -> None:
    result = run("http://127.0.0.1:9", *arguments)
    assert result.exit_code == 1
    assert message in result.output


def wait_for_requests(url: str, num: int) -> None:
    """Until the stub has seen ``num``."""
    deadline = time.monotonic() + 30
    while json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["num_seen"] < num:
        assert time.monotonic() < deadline, "the benchmark sends nothing"
        time.sleep(0.05)


def command(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "distserve.bench", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"COLUMNS": "100"},
    )


def test_ctrl_c_reports_what_was_measured(start_stub: Start, tmp_path: Path) -> None:
    url = start_stub(ttft=0.01, itl=0.01)
    process = command(url, "--rate", 20, "--duration", 60, "--output-len", 10, "--output-dir", tmp_path)
    wait_for_requests(url, 20)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert "interrupted" in output
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["interrupted"]
    assert 5 < document["runs"][0]["summary"]["num_ok"] < 100


def test_a_server_that_dies_ends_the_run_with_a_report(tmp_path: Path) -> None:
    stub = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("stub_server.py")), "--ttft=0.01", "--itl=0.005"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with stub:
        assert stub.stdout is not None
        url = f"http://127.0.0.1:{int(stub.stdout.readline())}"
        process = command(url, "--rate", 20, "--duration", 60, "--output-len", 10, "--output", tmp_path / "result.json")
        wait_for_requests(url, 20)
        stub.kill()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 1, output
    assert "no longer accepts connections" in output
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["runs"][0]["summary"]["num_ok"] > 5


def test_the_package_loads_without_torch_or_the_rest_of_ours() -> None:
    code = (
        "import sys, distserve.bench.command, distserve.bench.session, distserve.bench.plots;"
        "print([m for m in sys.modules if m in ('torch', 'ray', 'transformers') or"
        " m.startswith('distserve.') and not m.startswith('distserve.bench')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
