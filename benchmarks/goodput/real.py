"""Which way to serve, measured on this machine: disaggregated, mixed, hybrid, and vLLM in its ways, on the same cores.

    python -m benchmarks.goodput.real --model MODEL --vllm VENV                # from the repository's root; hours
    python -m benchmarks.goodput.real ... --minutes 40                         # a slice: begins nothing new after that
    python -m benchmarks.goodput.real ... --only chat --only mixed-x1          # some workloads, some contenders
    python -m benchmarks.goodput.real --report                                 # predictions, tables and plots
    python -m benchmarks.goodput.real ... --quick --output-dir SOMEWHERE       # a rehearsal

MODEL is what `python benchmarks/make_model.py MODEL` writes, VENV vLLM's virtual environment. Every run is kept as soon
as it ends, and a later invocation goes on where this one stopped: it can be ended at any time. A run during which other
processes took the cores is not kept (``--max-other-load``).

Of each contender, for each workload, Poisson arrivals at rising rates, until the rate at which each of the three
objectives is missed lies between two that are no further apart than 1.2. The runs of a rate have the same number of
requests and the same lengths, in another order with another seed. Then other token budgets for a step are tried
where they could do better. Further rounds, with other seeds, repeat the runs around each of these rates, contender
after contender; a goodput is the median of the rounds. The simulator predicts every run of ours, from a profile that
`distserve profile` takes first.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.common.load import LoadError, bench, summary
from benchmarks.common.machine import commit
from benchmarks.common.progress import say
from benchmarks.common.servers import Server, ServerError, unwind_on_sigterm
from benchmarks.common.slices import Slice, SliceOverError
from benchmarks.common.store import Store
from benchmarks.common.systems import MAX_BATCH_SIZE, MAX_MODEL_LEN, Bench
from benchmarks.common.traces import write_trace
from benchmarks.goodput.measured.contenders import CONTENDERS, Contender
from benchmarks.goodput.measured.invocation import parse, parser_for, prepared
from benchmarks.goodput.measured.ladder import Ladder
from benchmarks.goodput.measured.prediction import predict
from benchmarks.goodput.measured.real_report import write_report
from benchmarks.goodput.measured.results import Results, run_name
from benchmarks.goodput.measured.runs import OBJECTIVES, TARGET, WORKLOADS, Requests, balanced
from distserve.core.errors import DistserveError
from simulator.latency.measured import ProfileLatencyModel

RESULTS = Path(__file__).parent / "results" / "real"
DTYPE = "bfloat16"
_LEAST_REQUESTS = 20
_WARM_UP_SHARE = 1 / 6
_TIMEOUT = 20.0
"""Seconds after which a request is given up, and has missed: an overloaded run ends soon after its arrivals."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__, RESULTS, [*WORKLOADS, *CONTENDERS], quick="two rates of few requests")
    parser.add_argument("--rounds", type=int, default=3, help="1: the curves alone")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals in each run")
    parser.add_argument("--coarse", action="store_true", help="brackets of one step")
    parser.add_argument("--default-budgets", action="store_true", help="try no other budgets")
    parser.add_argument("--least", type=float, default=0.25, metavar="RATE", help="the lowest rate to try, requests/s")
    options = parse(parser)
    if options.quick:
        options.seconds = 4.0
    return options


def main() -> int:
    """Measure what is missing, predict it, and write the report; 1 if something could not be measured."""
    unwind_on_sigterm()
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(Store(options.output_dir))
    failed = is_over = False
    if not options.report:
        with prepared("benchmarks.goodput.real", options) as systems:
            session = Session(options, results, systems)
            try:
                session.run()
            except SliceOverError as over:
                is_over = True
                say(f"{over}: run it again to go on")
        failed = bool(session.failures)
    if not is_over:
        # A slice of quiet time is too dear for what can be done at any time.
        predict_missing(options.output_dir, results)
    write_report(options.output_dir, results)
    print((options.output_dir / "report.md").read_text())
    return int(failed)


class Session:
    """One invocation's measuring."""

    def __init__(self, options: argparse.Namespace, results: Results, systems: Bench) -> None:
        self._options = options
        self._results = results
        self._systems = systems
        self._slice = Slice(options.minutes, options.max_other_load)
        self._vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
        if options.quick:
            self._ladder = Ladder(target=TARGET, start=1.0, step=2.0, width=9.0, least=1.0, most=2.0)
        else:
            self._ladder = Ladder(target=TARGET, width=1.5 if options.coarse else 1.2, least=options.least)
        self.failures: list[str] = []

    def run(self) -> None:
        """Everything that was asked for and is not there yet; raises SliceOverError where it has to end before."""
        only = self._options.only
        workloads = [name for name in WORKLOADS if name in only] or list(WORKLOADS)
        contenders = [contender for name, contender in CONTENDERS.items() if name in only]
        contenders = contenders or list(CONTENDERS.values())
        for threads in sorted({one.deployment.threads for one in contenders if one.deployment is not None}):
            self._take_profile(threads)
        for number in range(1, self._options.rounds + 1):
            for workload in workloads:
                for contender in contenders:
                    for budget, next_rate in self._plans(number, workload, contender):
                        self._visit(number, workload, contender, budget, next_rate)

    def _plans(
        self, number: int, workload: str, contender: Contender
    ) -> Iterator[tuple[int, Callable[[dict[float, list[float]]], float | None]]]:
        """The budgets to visit in a round, with what says which rate comes next."""
        ladder, results = self._ladder, self._results
        first, *others = contender.budgets
        if number == 1:
            yield first, ladder.next_rate
            for budget in [] if self._options.default_budgets or self._options.quick else others:
                # Another budget is of use where it serves a rate that none of those before it did.
                best = [results.limit(workload, contender, index, until=budget) for index in range(len(OBJECTIVES))]
                yield budget, partial(ladder.next_challenge, best=best)
            return
        found = [results.candidates(workload, contender, index) for index in range(len(OBJECTIVES))]
        for budget in contender.budgets:
            brackets = {i: one.ends for i, candidates in enumerate(found) for one in candidates if one.budget == budget}
            if brackets:
                yield budget, partial(ladder.next_repetition, brackets=brackets)

    def _visit(
        self,
        number: int,
        workload: str,
        contender: Contender,
        budget: int,
        next_rate: Callable[[dict[float, list[float]]], float | None],
    ) -> None:
        """Start the server, if a rate is missing, and measure until none is."""
        curve = self._results.curve(number, workload, contender.name, budget)
        if next_rate(curve) is None:
            return
        where = f"round {number}, {workload}, {contender.title}, {budget} tokens a step"
        self._slice.check()
        try:
            with contender.serving(self._systems, budget) as server:
                say(f"{where}: ready after {server.ready_seconds:.0f} s")
                self._warm_up(server)
                while (rate := next_rate(curve)) is not None:
                    self._slice.check()
                    run = self._measure(server, number, workload, contender, budget, rate)
                    curve[rate] = Requests.from_json(run["requests"]).attainments(run["warmup"])
                    shares = ", ".join(
                        f"{name} {share:.0%}" for name, share in zip(OBJECTIVES, curve[rate], strict=True)
                    )
                    say(f"{where}, {rate:g}/s: {shares}; other load {run['other_load']:.2f}")
        except (LoadError, ServerError) as error:
            self.failures.append(where)
            print(f"error in {where}, the others go on: {error}", file=sys.stderr)

    def _measure(
        self, server: Server, number: int, workload: str, contender: Contender, budget: int, rate: float
    ) -> dict[str, Any]:
        """One run, kept."""
        seconds = self._options.seconds if self._options.quick else max(self._options.seconds, _LEAST_REQUESTS / rate)
        warmup = seconds * _WARM_UP_SHARE
        seed = 10 * number + list(WORKLOADS).index(workload)
        log = self._systems.logs / "bench.log"
        with TemporaryDirectory() as directory:
            trace = Path(directory) / "trace.jsonl"
            write_trace(trace, balanced(WORKLOADS[workload], rate, seconds, seed))
            load = {
                "vocab_size": self._vocab_size,
                "trace": trace,
                "trace_format": "mooncake",
                "warmup": warmup,
                "seed": seed,
                "timeout": _TIMEOUT,
            }
            document, other_load = self._slice.measure(partial(bench, server.url, load, log=log, may_miss=True), server)
        found = summary(document)
        run = {
            "round": number,
            "workload": workload,
            "contender": contender.name,
            "budget": budget,
            "rate": rate,
            "seed": seed,
            "seconds": seconds,
            "warmup": warmup,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "other_load": other_load,
            "requests": Requests.measured(document["runs"][0]["requests"]).to_json(),
            "request_throughput": found["request_throughput"],
            "output_throughput": found["output_token_throughput"],
            "itl": {name: found["itl"][name] for name in ("mean", "p50", "p90", "p99")},
        }
        self._results.keep(run)
        return run

    def _warm_up(self, server: Server) -> None:
        """First-time work of a server, long prompts and batches among it."""
        load = {"vocab_size": self._vocab_size, "clients": 4, "num_requests": 8, "prompt_len": 700, "output_len": 24}
        bench(server.url, {**load, "seed": 99}, log=self._systems.logs / "bench.log", may_miss=True)

    def _take_profile(self, threads: int) -> None:
        path = profile_path(self._options.output_dir, threads)
        if path.exists():
            return
        from distserve.cluster.profile_command import profile

        self._slice.check()
        say(f"profiling {threads} thread{'s' if threads > 1 else ''}")
        words = ["--dtype", DTYPE, "--threads", str(threads), "--max-batch-tokens", "512"]
        words += ["--max-batch-size", str(MAX_BATCH_SIZE), "--max-model-len", str(MAX_MODEL_LEN)]
        words += ["--output", str(path), *(["--quick"] if self._options.quick else []), str(self._systems.model)]
        try:
            profile.main(words, standalone_mode=False)
        except click.ClickException as error:
            self.failures.append(path.name)
            print(f"error in {path.name}, its runs are not predicted: {error.message}", file=sys.stderr)


def profile_path(directory: Path, threads: int) -> Path:
    """Where the profile of engines with so many threads is."""
    return directory / f"profile-{threads}-threads.json"


def predict_missing(directory: Path, results: Results) -> None:
    """Predict every run of ours that was not yet, as far as there are profiles."""
    for run in results.runs():
        contender = CONTENDERS[run["contender"]]
        if contender.deployment is None or results.prediction(run) is not None:
            continue
        path = profile_path(directory, contender.deployment.threads)
        if path.exists():
            try:
                results.keep_prediction(run, predict(ProfileLatencyModel.read(path), contender, run))
            except DistserveError as error:
                print(f"{run_name(run)} is not predicted: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
