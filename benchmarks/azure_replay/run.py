"""Replays ten minutes of the Azure 2023 conversation trace through HTTP on two prefill and one decode instance.

    python -m benchmarks.azure_replay.run                     # from the repository's root; about eight minutes
    python -m benchmarks.azure_replay.run --quick             # the first minute of the trace, to try it out

The embedded demo model is served. Every length is scaled by one factor, so that the longest request fits the model's
context; none is clipped. First the goodput of this set-up is measured, on the same lengths with Poisson arrivals; then
the trace is replayed in its own order with its own bursts, its times scaled to between
55% and 80% of that goodput. It fails unless
every request succeeds with the output length it asked for, and every instance ends with all KV blocks free.

The trace is AzureLLMInferenceTrace_conv of https://github.com/Azure/AzurePublicDataset (CC-BY).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.azure_replay.report import write_report, write_requests
from benchmarks.common.load import Document, LoadError, bench
from benchmarks.common.machine import ROOT, describe_run
from benchmarks.common.progress import say
from benchmarks.common.servers import Server, ServerError, free_port, running, unwind_on_sigterm
from distserve.bench.errors import WorkloadError
from distserve.bench.traces import Trace, read_trace

TRACE_NAME = "azure2023_conv.csv"
TRACE_SECONDS = 600.0
SLO = {"slo_ttft": 0.5, "slo_tpot": 0.05, "attainment": 0.9}
SHARES = (0.55, 0.8)
"""The replay's mean rate is between these shares of the smallest rate that missed the SLO."""
_REST_SECONDS = 10.0
_DISTSERVE = Path(sys.executable).with_name("distserve")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help=f"the trace's CSV; default: {TRACE_NAME} beside the repository")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="how long the replay should take, if the goodput allows it"
    )
    parser.add_argument("--quick", action="store_true", help="one minute of the trace and short probes")
    return parser.parse_args()


def find_trace() -> Path | None:
    """The trace where a checkout's neighbour keeps data; None if it is not there."""
    places = [ROOT.parent / "shared" / "data" / "traces", ROOT / "data" / "traces", ROOT / "data"]
    return next((place / TRACE_NAME for place in places if (place / TRACE_NAME).is_file()), None)


def main() -> int:
    """Measure, write the results, and say whether they are as they must be."""
    unwind_on_sigterm()
    options = parse_arguments()
    path = options.trace or find_trace()
    if path is None:
        print(
            f"{TRACE_NAME} is not here: download AzureLLMInferenceTrace_conv.csv from "
            "https://github.com/Azure/AzurePublicDataset and give it by --trace",
            file=sys.stderr,
        )
        return 0
    start = time.monotonic()
    seconds = TRACE_SECONDS / 10 if options.quick else TRACE_SECONDS
    try:
        trace = read_trace(path, "azure").window(0, seconds)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        result = measure(path, trace, seconds, options)
    except (WorkloadError, LoadError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(options.output_dir, result)
    for problem in result["problems"]:
        print(f"FAILED: {problem}", file=sys.stderr)
    say(f"the whole took {time.monotonic() - start:.0f} s")
    print((options.output_dir / "report.md").read_text())
    return 1 if result["problems"] else 0


def measure(path: Path, trace: Trace, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Serve, find the goodput, replay; everything a reader of the result needs."""
    facts = describe_run("benchmarks.azure_replay.run")
    port = free_port()
    command: list[str | Path] = [
        _DISTSERVE,
        "serve",
        "--prefill",
        "2",
        "--decode",
        "1",
        "--dtype",
        "bfloat16",
        "--port",
        str(port),
    ]
    context = demo_context()
    lengths = {"trace": path, "trace_end": seconds, "fit_context": context}
    with TemporaryDirectory() as directory:
        log = Path(directory) / "bench.log"
        say(f"starting: {' '.join(str(part) for part in command[1:])}")
        with running("distserve", command, f"http://127.0.0.1:{port}", Path(directory) / "serve.log") as server:
            say(f"ready after {server.ready_seconds:.1f} s; looking for the goodput")
            search = bench(
                server.url,
                {
                    "find_goodput": True,
                    "rate": 16,
                    "duration": 10 if options.quick else 20,
                    "tolerance": 0.15,
                    "max_probes": 6,
                    **SLO,
                    **lengths,
                },
                log=log,
                may_miss=True,
            )
            goodput = search["goodput"]
            if not goodput["low"]:
                raise LoadError(f"no rate meets the SLO: {goodput['reason']}")
            capacity = goodput["high"] or goodput["low"]
            rate = min(max(len(trace) / options.seconds, SHARES[0] * capacity), SHARES[1] * capacity)
            expected = len(trace) / rate
            say(f"goodput {goodput['low']:.1f}/s; replaying {len(trace)} requests at {rate:.1f}/s, {expected:.0f} s")
            document = bench(
                server.url,
                {"arrivals": "trace", "rate": rate, "return_timeline": True, "timeout": 300, **SLO, **lengths},
                log=log,
                output_dir=options.output_dir,
                may_miss=True,
            )
            leaks = find_leaks(server)
            metrics = server.metrics()
    write_requests(options.output_dir / "requests.csv.gz", document["runs"][0]["requests"])
    return {
        **facts,
        "trace": {"name": path.name, "seconds": seconds, "num_requests": len(trace)},
        "serve": [str(part) for part in ("distserve", *command[1:])],
        "ready_seconds": server.ready_seconds,
        "context": context,
        "slo": SLO,
        "goodput": {key: goodput[key] for key in ("low", "high", "reason", "probes")},
        "replay": {
            "rate": rate,
            "share_of_goodput": rate / capacity,
            "speedup": seconds / expected,
            "length_factor": document["runs"][0]["length_factor"],
            "summary": document["runs"][0]["summary"],
            "phases": mean_phases(document),
        },
        "cluster": {name: value for name, value in sorted(metrics.items()) if "instance=" in name},
        "problems": [*find_failures(document, len(trace)), *leaks],
    }


def demo_context() -> int:
    """Tokens of prompt and output that the demo model takes."""
    config = json.loads((ROOT / "distserve" / "demo" / "model" / "config.json").read_text())
    return int(config["max_position_embeddings"])


def find_failures(document: Document, num_requests: int) -> list[str]:
    """What is wrong with the replay's answers, one sentence each."""
    (run,) = document["runs"]
    problems = []
    requests = run["requests"]
    ok = [request for request in requests if request["status"] == "ok"]
    if len(requests) != num_requests:
        problems.append(f"{len(requests)} of {num_requests} requests were sent")
    if len(ok) != len(requests):
        problems.append(f"{len(requests) - len(ok)} requests failed: {run['summary']['errors']}")
    short = [request for request in ok if request["num_output_tokens"] != request["output_len"]]
    if short:
        problems.append(f"{len(short)} answers have another length than asked for, e.g. {short[0]}")
    return problems


def find_leaks(server: Server) -> list[str]:
    """What is left on any instance once it reports again, one sentence each."""
    deadline = time.monotonic() + _REST_SECONDS
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while True:
        gauges = {
            key: value
            for key, value in server.metrics().items()
            if key.startswith(tuple(f"distserve:{n}" for n in names))
        }
        left = {key: value for key, value in gauges.items() if value}
        if len(gauges) == 3 * len(names) and not left:
            return []
        if time.monotonic() > deadline:
            return [f"{key} is {value:g} after all requests have ended" for key, value in left.items()] or [
                f"{len(gauges)} gauges reported, {3 * len(names)} expected: an instance is missing"
            ]
        time.sleep(0.5)


def mean_phases(document: Document) -> dict[str, float]:
    """Mean seconds of each phase that the server's own timelines tell, over the requests that had it."""
    sums: dict[str, list[float]] = {}
    for request in document["runs"][0]["requests"]:
        for name in ("queue_seconds", "prefill_seconds", "migration_seconds", "decode_seconds"):
            if (value := (request["timeline"] or {}).get(name)) is not None:
                sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


if __name__ == "__main__":
    sys.exit(main())
