"""The closed-loop client reads what servers stream, all clients get the same requests, and deviations are found."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from benchmarks.common.traces import write_trace
from benchmarks.outside_clients.closed_loop import Query, Server, load, read_queries
from benchmarks.outside_clients.report import CONTROL, REFERENCE, deviations, misses, write_report
from benchmarks.outside_clients.run import steady_server, write_small_model
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import parse_lengths
from distserve.bench.traces import read_trace
from distserve.bench.workload import Workload, WorkloadSpec

VOCABULARY = 50


class Streaming(BaseHTTPRequestHandler):
    """Answers a completion with an event per token, cut into pieces that do not end where events do."""

    is_cut_off = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert all(0 <= token < VOCABULARY for token in body["prompt"])
        assert body["stream"]
        assert body["ignore_eos"]
        num = body["max_tokens"]
        events = [
            {"choices": [{"text": "data", "finish_reason": "length" if i == num - 1 else None}]} for i in range(num)
        ]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        stream += "" if self.is_cut_off else "data: [DONE]\n\n"
        self.send_response(200)
        self.end_headers()
        for begin in range(0, len(stream), 37):
            self.wfile.write(stream[begin : begin + 37].encode())
            self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Streaming) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def small_workload() -> Workload:
    prompt, output = parse_lengths("normal:mean=700,std=300,max=1500"), parse_lengths("normal:mean=9,std=3")
    return WorkloadSpec(Gamma(), prompt, output, num_requests=12, seed=1).at(5.0)


def test_the_closed_loop_reads_every_answer_to_its_end(url: str, tmp_path: Path) -> None:
    workload = small_workload()
    write_trace(tmp_path / "trace.jsonl", workload)
    queries = read_queries(tmp_path / "trace.jsonl", 10)
    answers, duration = load(Server(url, "m", VOCABULARY, 10.0), queries, num_clients=4)
    assert sorted(answer.index for answer in answers) == list(range(10))
    assert sum(answer.output_tokens for answer in answers) == workload.output_lens[:10].sum()
    assert 0 < max(answer.latency for answer in answers) <= duration


def test_an_answer_that_breaks_off_is_an_error(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streaming, "is_cut_off", True)
    write_trace(tmp_path / "trace.jsonl", small_workload())
    with pytest.raises(RuntimeError, match="a request failed"):
        load(Server(url, "m", VOCABULARY, 10.0), read_queries(tmp_path / "trace.jsonl", 10), num_clients=3)


def test_engines_that_keep_time_take_as_long_for_the_same_again(tmp_path: Path) -> None:
    """A prompt takes 12 ms and 0.15 ms a token, every further token 20.4 ms."""
    write_small_model(tmp_path / "small")
    with steady_server(tmp_path / "small", tmp_path) as server:
        client = Server(server.url, "small", VOCABULARY, 20.0)
        queries = [Query(index, 100, num) for index, num in enumerate((1, 1, 21, 21))]
        answers, _ = load(client, queries, num_clients=1)
    latencies = {num: [a.latency for a in answers if a.output_tokens == num] for num in (1, 21)}
    assert min(latencies[1]) > 0.027
    assert min(latencies[21]) > 0.027 + 20 * 0.0204
    assert min(latencies[21]) < 2 * (0.027 + 20 * 0.0204), "what is beside the steps is little"


def test_the_trace_is_what_distserve_bench_reads(tmp_path: Path) -> None:
    workload = small_workload()
    write_trace(tmp_path / "trace.jsonl", workload)
    trace = read_trace(tmp_path / "trace.jsonl", "mooncake")
    assert trace.prompt_lens.tolist() == workload.prompt_lens.tolist()
    assert trace.output_lens.tolist() == workload.output_lens.tolist()
    assert workload.arrivals is not None
    assert trace.timestamps is not None
    np.testing.assert_allclose(trace.timestamps, workload.arrivals - workload.arrivals[0], atol=1e-5)
    assert trace.prefix_blocks is not None
    blocks = [block for request in trace.prefix_blocks for block in request]
    assert len(set(blocks)) == len(blocks), "no prompt finds another's in a cache"


def test_deviations_are_medians_of_the_rounds_and_out_of_bounds_marked(tmp_path: Path) -> None:
    clients = {
        REFERENCE: [{"throughput": value, "latency_mean": 1.0} for value in (100.0, 50.0, 200.0)],
        "closed_loop.py": [{"throughput": value, "latency_mean": 1.04} for value in (50.0, 53.0, 214.0)],
        CONTROL: [{"throughput": 200.0, "latency_mean": 1.0} for _ in range(3)],
    }
    assert deviations(clients, "closed_loop.py") == pytest.approx({"throughput": 0.06, "latency_mean": 0.04})
    assert misses(clients, "closed_loop.py") == ["throughput"]
    facts = dict.fromkeys(("date", "cpu", "num_cpus", "commit", "load_average_at_start", "command"), "")
    result = {**facts, "duration": 1.0, "other_load": 0.0, "vllm": {}, "loads": {"1 client": clients}}
    assert write_report(tmp_path, result) == 1
    text = (tmp_path / "report.md").read_text()
    assert "1 of 2 figures agree" in text
    assert "With itself, asking again, it agrees in 1 of 2" in text, (
        "what one client is off itself is not held against the others"
    )
    assert "**53.0 (+6.0%)**" in text
