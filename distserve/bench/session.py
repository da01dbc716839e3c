"""One invocation of the benchmark: check the server, run what was asked, collect the results.

It owns the event loop's signal handler and the client; it writes nothing but progress.
"""

import asyncio
import contextlib
import itertools
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distserve.bench.arrivals import Gamma
from distserve.bench.client import Client, open_client
from distserve.bench.errors import TargetError, WorkloadError
from distserve.bench.goodput import Goodput, Probe, find_goodput
from distserve.bench.metrics import SLO, attainment, counted
from distserve.bench.plan import Plan, Search
from distserve.bench.progress import Progress
from distserve.bench.prompts import TextPrompts, TokenPrompts
from distserve.bench.records import Status
from distserve.bench.runner import Monitor, Run, Runner
from distserve.bench.steady import judge_stability
from distserve.bench.target import Target
from distserve.bench.workload import Workload

_FALLBACK_VOCAB = 1000
_TRIAL_PROMPT, _TRIAL_OUTPUT = 8, 2
_SETTLE_SECONDS = 60.0
_CALIBRATION_WORDS = (16, 80)
_LEAVE_SOME = "a longer --duration, more --num-requests or a shorter --warmup leave some to count"


@dataclass(frozen=True)
class Measured:
    """A run and the load it was given."""

    label: str
    rate: float | None
    workload: Workload
    run: Run


@dataclass
class Outcome:
    """Everything measured; ``error`` when the server died on the way, or nothing could be counted."""

    model: str
    runs: list[Measured] = field(default_factory=list)
    goodput: Goodput | None = None
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    error: str = ""


async def run_session(plan: Plan, progress: Progress, api_key: str | None = None) -> Outcome:
    """Carry out ``plan``.

    Ctrl-C ends the run in progress and returns what was measured.

    Raises:
        WorkloadError: a rate of the plan has no load that could be measured; nothing has been sent then.
        TargetError: the server cannot be measured at all.
    """
    workloads = [] if plan.search is not None else _workloads(plan)
    _raise_file_limit()
    async with open_client(plan.target, api_key) as client:
        client.target = await _resolve_model(client)
        session = _Session(plan, client, progress)
        await session.prepare()
        with session.handling_interrupt():
            if plan.search is not None:
                await session.search_goodput(plan.search)
            else:
                await session.run_all(workloads)
        return session.outcome


class _Session:
    def __init__(self, plan: Plan, client: Client, progress: Progress) -> None:
        self.plan = plan
        self.client = client
        self.progress = progress
        self.runner = Runner(client, timeout=plan.timeout)
        self.outcome = Outcome(client.target.model)
        self.vocab_size = plan.vocab_size or 0
        self.text = TextPrompts(plan.workload.seed)
        self.idle_ttft = 0.0

    @contextlib.contextmanager
    def handling_interrupt(self) -> Iterator[None]:
        """Ctrl-C ends the run; a second one ends the process as usual."""
        loop = asyncio.get_running_loop()

        def on_interrupt() -> None:
            self.runner.interrupt()
            loop.remove_signal_handler(signal.SIGINT)

        try:
            loop.add_signal_handler(signal.SIGINT, on_interrupt)
        except (RuntimeError, NotImplementedError):
            # Not the main thread, or a platform without it: then whoever embeds us handles interrupts.
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def prepare(self) -> None:
        """Find out the vocabulary or the cost of a word, and that a small request succeeds."""
        trial = min(self.plan.timeout, 60.0)
        if self.plan.text_prompts:
            await self._calibrate(trial)
        elif not self.vocab_size:
            self.vocab_size = await _ask_vocab_size(self.client)
            if not self.vocab_size:
                self.vocab_size = _FALLBACK_VOCAB
                self.outcome.notes.append(
                    f"the server does not tell its vocabulary: token ids below {_FALLBACK_VOCAB} used (--vocab-size)"
                )
        # Twice: the first may pay for connections and first-time work of the server.
        for index in range(2):
            record = await self.client.try_once(self._prompt(-1, index), _TRIAL_OUTPUT, trial)
        assert record.ttft is not None
        self.idle_ttft = record.ttft

    def _prompt(self, run: int, index: int) -> list[int] | str:
        return self._prompts(run, None)(index, _TRIAL_PROMPT)

    def _prompts(self, run: int, workload: Workload | None) -> Callable[[int, int], list[int] | str]:
        # Another seed for every run: no run may find the prompts of an earlier one in a prefix cache.
        seed = self.plan.workload.seed * 1_000_003 + run + 1
        if self.plan.text_prompts:
            if workload is not None and workload.prefix_blocks is not None:
                self._note("texts share no prefixes: those of the trace's prompts are left out")
            return replace(self.text, seed=seed).make
        if workload is None:
            return TokenPrompts(self.vocab_size, seed).make
        return TokenPrompts(self.vocab_size, seed, workload.prefix_blocks, workload.block_tokens).make

    def _note(self, text: str) -> None:
        if text not in self.outcome.notes:
            self.outcome.notes.append(text)

    async def _calibrate(self, limit: float) -> None:
        few, many = _CALIBRATION_WORDS
        counts = []
        for words in (few, many):
            record = await self.client.try_once(self.text.make(words, words), 1, limit)
            if record.num_prompt_tokens is None:
                self.outcome.notes.append("the server reports no usage: one token per word of a text prompt assumed")
                return
            counts.append(record.num_prompt_tokens)
        per_word = (counts[1] - counts[0]) / (many - few)
        if per_word <= 0:
            self.outcome.notes.append("the server's prompt token counts do not grow with the prompt: not calibrated")
            return
        self.text = replace(self.text, tokens_per_word=per_word, overhead_tokens=counts[0] - per_word * few)

    async def run_all(self, workloads: Sequence[Workload]) -> None:
        """Every rate of the plan in turn, with its workload."""
        for number, (rate, workload) in enumerate(zip(self.plan.rates, workloads, strict=True)):
            if number and not await self._settle():
                return
            label = self._label(rate)
            run = await self._measure(number, label, workload, _never)
            self.outcome.runs.append(Measured(label, rate, workload, run))
            if self._ended(run):
                return
            if not counted(run.records, self.plan.warmup):
                self.outcome.error = (
                    f"with {label} no request began after the warm-up of {self.plan.warmup:g} s: {_LEAVE_SOME}"
                )
                return

    def _label(self, rate: float | None) -> str:
        if self.plan.clients is not None:
            return f"{self.plan.clients} clients"
        return f"{rate:g} requests/s" if rate is not None else f"trace times x{self.plan.workload.time_scale:g}"

    def _ended(self, run: Run) -> bool:
        self.outcome.interrupted = self.outcome.interrupted or run.interrupted
        if run.server_died:
            self.outcome.error = f"{self.plan.target.base_url}: {run.stopped}"
        return run.interrupted or run.server_died

    async def _measure(self, number: int, label: str, workload: Workload, decide: Monitor) -> Run:
        prompts = self._prompts(number, workload)
        spec = self.plan.workload
        with self.progress.run(
            label, spec.duration if self.plan.clients and spec.num_requests is None else None
        ) as show:

            def monitor(run: Run) -> str:
                show(run)
                return decide(run)

            if self.plan.clients is None:
                return await self.runner.open_loop(workload, prompts, monitor)
            return await self.runner.closed_loop(
                workload,
                prompts,
                monitor,
                num_clients=self.plan.clients,
                num_requests=spec.num_requests,
                duration=spec.duration,
            )

    async def search_goodput(self, search: Search) -> None:
        """Bisect; every probe is kept as a run too."""

        async def probe(rate: float) -> Probe:
            if self.outcome.runs and not await self._settle():
                return Probe(rate, False, self.outcome.error or "interrupted", 0.0, complete=False)
            return await self._probe(rate)

        self.outcome.goodput = await find_goodput(
            probe,
            start=search.start,
            min_rate=search.min_rate,
            max_rate=search.max_rate,
            tolerance=search.tolerance,
            max_probes=search.max_probes,
        )

    async def _probe(self, rate: float) -> Probe:
        slo, warmup = self.plan.slo, self.plan.warmup
        assert slo is not None
        try:
            workload = self.plan.workload.at(rate)
            num_counted = _num_counted(workload, warmup)
        except WorkloadError as error:
            return self._void(rate, f"at {rate:g}/s {error}")
        assert workload.arrivals is not None

        bound = 1.0

        def decide(run: Run) -> str:
            nonlocal bound
            bound = 1 - _num_missed(run, slo, warmup) / num_counted
            return f"at most {bound:.1%} can still meet the SLO" if bound < slo.attainment else ""

        label = f"{rate:g} requests/s"
        run = await self._measure(len(self.outcome.runs), label, workload, decide)
        self.outcome.runs.append(Measured(label, rate, workload, run))
        if self._ended(run):
            return Probe(rate, False, run.stopped, bound, complete=False)
        if run.stopped:
            return Probe(rate, False, run.stopped, bound, decided_early=True)
        share = attainment(counted(run.records, warmup), slo)
        assert share is not None
        arrivals = self.plan.workload.arrivals
        stability = judge_stability(
            run.records,
            warmup,
            float(workload.arrivals[-1]),
            cv=arrivals.cv if isinstance(arrivals, Gamma) else 1.0,
            ttft_scale=slo.ttft,
        )
        if share.both < slo.attainment:
            verdict = f"{share.both:.1%} met the SLO, {slo.attainment:.1%} asked"
        elif not stability.stable:
            verdict = f"unstable: {stability.reason}"
        else:
            verdict = f"{share.both:.1%} met the SLO, steady"
        passed = share.both >= slo.attainment and stability.stable
        return Probe(rate, passed, verdict, share.both, stability=stability)

    def _void(self, rate: float, why: str) -> Probe:
        """A rate that cannot be judged ends the search as an error; the probes before it are kept."""
        self.outcome.error = why
        return Probe(rate, False, why, 0.0, complete=False)

    async def _settle(self) -> bool:
        """Wait until a small request is answered about as fast as on the idle server, at most a minute.

        Requests that we cut off may still be running there, and must not burden the next run. False: interrupted, or
        the server is gone; no further run makes sense.
        """
        limit = max(3 * self.idle_ttft, self.idle_ttft + 0.05)
        deadline = time.perf_counter() + _SETTLE_SECONDS
        for index in itertools.count(2):
            left = deadline - time.perf_counter()
            trial = self.client.try_once(self._prompt(-1, index), _TRIAL_OUTPUT, max(left, 1.0), may_wait=True)
            try:
                record = await self.runner.unless_interrupted(trial)
            except TargetError as error:
                self.outcome.error = str(error)
                return False
            if record is None:
                self.outcome.interrupted = True
                return False
            if record.status is Status.OK and record.ttft is not None and record.ttft <= limit:
                return True
            if left <= 0:
                break
            await asyncio.sleep(0.2)
        self.outcome.notes.append(
            f"the server did not come to rest within {_SETTLE_SECONDS:g} s: the next run began under load"
        )
        return True


def _never(run: Run) -> str:  # noqa: ARG001  a monitor that lets every run end by itself
    return ""


def _workloads(plan: Plan) -> list[Workload]:
    """That of each rate. Raises WorkloadError, with the rate, for one that cannot be made or has nothing to count."""
    workloads = []
    for rate in plan.rates:
        try:
            workload = plan.workload.at(rate)
            if workload.arrivals is not None:
                _num_counted(workload, plan.warmup)
        except WorkloadError as error:
            raise WorkloadError(str(error) if rate is None else f"at {rate:g}/s {error}") from error
        workloads.append(workload)
    return workloads


def _num_counted(workload: Workload, warmup: float) -> int:
    """Requests of open-loop load that arrive after the warm-up. Raises WorkloadError when there is none."""
    assert workload.arrivals is not None
    num = int((workload.arrivals >= warmup).sum())
    if not num:
        last = float(workload.arrivals[-1])
        raise WorkloadError(
            f"the last request arrives after {last:.1f} s, within the warm-up of {warmup:g} s: {_LEAVE_SOME}"
        )
    return num


def _num_missed(run: Run, slo: SLO, warmup: float) -> int:
    """Counted requests that have certainly missed by now, whatever comes."""
    now = run.now
    missed = 0
    for record in run.records:
        if record.scheduled < warmup or record.status is Status.CANCELLED:
            continue
        if record.status is not Status.PENDING:
            missed += not record.meets(slo.ttft, slo.tpot)
        else:
            first = record.ttft
            missed += (now - record.scheduled if first is None else first) > slo.ttft
    return missed


async def _resolve_model(client: Client) -> Target:
    entries = await _model_entries(client)
    names = [str(entry.get("id")) for entry in entries]
    target = client.target
    if target.model:
        if names and target.model not in names:
            raise TargetError(f"the server has no model {target.model!r}; it has: {', '.join(names)}")
        return target
    if not names:
        raise TargetError(f"{target.base_url}/v1/models lists no model: name one with --model")
    return replace(target, model=names[0])


async def _model_entries(client: Client) -> list[dict[str, Any]]:
    answer = await client.get_json("/v1/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


async def _ask_vocab_size(client: Client) -> int:
    for entry in await _model_entries(client):
        size = entry.get("vocab_size")
        if entry.get("id") == client.target.model and isinstance(size, int) and size > 0:
            return size
    return 0


def _raise_file_limit() -> None:
    """One socket per request in flight: take as many files as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
