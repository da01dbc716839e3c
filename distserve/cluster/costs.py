"""What a cluster adds to its engines' own times, measured on a live one.

One prefill and one decode instance are served as ``distserve serve`` does it, in processes of their own, and asked over
HTTP from this one by ``distserve bench``'s client, one load after the other and never by Poisson arrivals: what is to
be predicted from a profile is not what it was taken on. Times come from the timelines that the server returns.

Where two engines have no cores of their own they would be in each other's way, and that is no cost of a cluster: there
one mixed instance is served, as it would be on such a machine.
"""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from distserve.bench.client import open_client
from distserve.bench.prompts import TokenPrompts
from distserve.bench.records import Status
from distserve.bench.runner import Run, Runner
from distserve.bench.target import Target
from distserve.bench.workload import Workload
from distserve.cluster.clock import cluster_time
from distserve.cluster.cost_fit import PROMPTS_ALONE, Cpu, Load, Sample, Samples, work_out
from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import InstanceError
from distserve.core.events import Migrated
from distserve.core.profile import ClusterCosts, MeasuredStepTime
from distserve.transfer.local import LocalNetwork, LocalTransport

_START_SECONDS = 180.0
_STOP_SECONDS = 30.0
_IDLE_SECONDS = 3.0
_PAUSE_SECONDS = 0.3
_REQUEST_SECONDS = 300.0
_NAME = "profiled"


@dataclass(frozen=True, slots=True)
class Loads:
    """What is asked of the cluster.

    ``usual``: prompts alone, short and long; decode batches alone; both at once. ``rested``: single prompts, each after
    a pause.
    """

    usual: tuple[Load, ...]
    rested: tuple[Load, ...]


def make_loads(max_batch_size: int, max_model_len: int, *, quick: bool) -> Loads:
    """Loads within the limits; fewer if ``quick``."""
    prompt, output = max(1, min(256, max_model_len // 4)), max(3, min(128, max_model_len // 8))
    long = max(1, min(1024, max_model_len // 2))
    batches = (1, 4) if quick else (1, 2, 4, 1, 2, 4, 12)
    service = [
        (2, 12, prompt, output // 4),
        (4, 24, prompt, output // 2),
        (8, 32, prompt // 2, output // 2),
        (3, 15, long // 2, output // 4),
        (4, 32, prompt // 16, output // 4),
    ]
    usual = (
        Load(1, 12 if quick else 24, 16, PROMPTS_ALONE),
        Load(1, 6 if quick else 12, long, PROMPTS_ALONE),
        *(Load(b, b if b > 1 else 3, prompt // (1 if b < 8 else 2), output) for b in batches if b <= max_batch_size),
        *(Load(b, n, max(1, p), max(3, o)) for b, n, p, o in service[: 1 if quick else None] if b <= max_batch_size),
    )
    rested = (Load(1, 1, prompt, max(PROMPTS_ALONE, output // 4)),) * (5 if quick else 15)
    return Loads(usual, rested)


def measure_costs(
    model_dir: Path,
    flags: Mapping[str, object],
    step_time: MeasuredStepTime,
    loads: Loads,
    *,
    layout: KvLayout,
    vocab_size: int,
    show: Callable[[str], None],
) -> ClusterCosts:
    """Start a cluster of ``model_dir`` with ``flags`` of ``distserve serve``, load it, stop it, and work out its costs.

    Args:
        model_dir: What to serve.
        flags: Of ``distserve serve``, by name.
        step_time: The engine's own times: what is beyond them is the cluster's.
        loads: As :func:`make_loads` makes them.
        layout: The instances' KV memory, for the time of pulls.
        vocab_size: Token ids are drawn below it.
        show: Told what is going on.

    Raises:
        InstanceError: the cluster did not start, or did not answer.
    """
    pull, pull_per_byte = measure_pulls(layout)
    num_threads = int(str(flags.get("threads", 1)))
    with _serving(model_dir, {**_instances(num_threads, len(os.sched_getaffinity(0))), **flags}, show) as (url, root):
        found = asyncio.run(_load(url, root, (*loads.usual, *loads.rested), vocab_size, num_threads, show))
    samples = Samples(found[: len(loads.usual)], found[len(loads.usual) :])
    return work_out(samples, step_time, pull=pull, pull_per_byte=pull_per_byte)


def _instances(num_threads: int, num_cores: int) -> dict[str, int]:
    """How many of which role are served."""
    return {"prefill": 1, "decode": 1} if 2 * num_threads <= num_cores else {"mixed": 1}


def measure_pulls(layout: KvLayout, num_blocks: int = 64, num_rounds: int = 30) -> tuple[float, float]:
    """Seconds that a pull within one host takes beside its bytes, and per byte."""
    small = KvLayout(
        layout.num_layers, num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim, layout.dtype
    )
    network = LocalNetwork()
    source = LocalTransport(small, network=network, clock=cluster_time)
    destination = LocalTransport(small, network=network, clock=cluster_time)
    try:
        destination.connect("source", source.address)
        one = median(_pull(destination, 2 * i, 1) for i in range(num_rounds))
        many = median(_pull(destination, 2 * i + 1, num_blocks) for i in range(num_rounds))
    finally:
        destination.close()
        source.close()
    per_block = max(0.0, many - one) / (num_blocks - 1)
    return max(0.0, one - per_block), per_block / (small.num_bytes / num_blocks)


def _pull(destination: LocalTransport, pull_id: int, num_blocks: int) -> float:
    ended: list[tuple[float, Migrated]] = []
    start = cluster_time()
    blocks = tuple(range(num_blocks))
    order = Migrate(pull_id, ("profile", 0), "source", blocks, blocks, num_blocks, 0, start + _REQUEST_SECONDS)
    destination.pull(order, lambda migrated: ended.append((cluster_time(), migrated)))
    while not ended:
        time.sleep(50e-6)
    assert ended[0][1].ok, ended[0][1].reason
    return ended[0][0] - start


# -- the cluster -------------------------------------------------------------------------------------------------------


@contextmanager
def _serving(
    model_dir: Path, flags: Mapping[str, object], show: Callable[[str], None]
) -> Iterator[tuple[str, psutil.Process]]:
    """A cluster as ``flags`` say: its URL, and the process that started the others and answers HTTP."""
    command = [sys.executable, "-m", "distserve.cli", "serve", str(model_dir), "--port", "0"]
    command += ["--served-model-name", _NAME]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    show("starting a cluster")
    with TemporaryDirectory(prefix="distserve-profile-") as directory:
        log = Path(directory) / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - our own
        try:
            yield _wait_for_url(process, log), psutil.Process(process.pid)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_for_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        for line in text.splitlines():
            if line.startswith("Serving ") and " at http" in line:
                return line.partition(" at ")[2].partition("/v1")[0]
        if process.poll() is not None:
            raise InstanceError(f"the cluster to be profiled did not start:\n{text[-2000:]}")
        time.sleep(0.1)
    raise InstanceError(f"the cluster to be profiled did not start within {_START_SECONDS:g} s")


async def _load(
    url: str,
    root: psutil.Process,
    loads: tuple[Load, ...],
    vocab_size: int,
    num_threads: int,
    show: Callable[[str], None],
) -> list[Sample]:
    samples = []
    target = Target(url, _NAME, return_timeline=True)
    async with open_client(target, None) as client:
        runner = Runner(client, timeout=_REQUEST_SECONDS)
        await _run(runner, Load(1, 3, loads[0].prompt_len, 8), vocab_size)
        before, start = _spent(root), time.perf_counter()
        await asyncio.sleep(_IDLE_SECONDS)
        rest = _cpu(before, _spent(root), num_threads)
        idle = (rest.light + sum(beside for _, beside in rest.instances.values())) / (time.perf_counter() - start)
        for load in loads:
            show(
                f"{load.num_clients} client{'s' if load.num_clients > 1 else ''}, {load.prompt_len} tokens in, "
                f"{load.output_len} out"
            )
            await asyncio.sleep(_PAUSE_SECONDS)
            before, start = _spent(root), time.perf_counter()
            run = await _run(runner, load, vocab_size)
            cpu, seconds = _cpu(before, _spent(root), num_threads), time.perf_counter() - start
            offset = cluster_time() - time.perf_counter() + run.started
            failed = [record for record in run.records if record.status is not Status.OK]
            if failed:
                raise InstanceError(f"the cluster to be profiled failed a request: {failed[0].error}")
            samples.append(Sample(load, run.records, cpu, seconds, idle, offset))
    return samples


async def _run(runner: Runner, load: Load, vocab_size: int) -> Run:
    workload = Workload(
        np.full(load.num_requests, load.prompt_len), np.full(load.num_requests, load.output_len), arrivals=None
    )
    return await runner.closed_loop(
        workload,
        TokenPrompts(vocab_size, load.num_requests).make,
        lambda run: "",  # noqa: ARG005 - every run ends by itself
        num_clients=load.num_clients,
        num_requests=load.num_requests,
        duration=None,
    )


@dataclass(frozen=True, slots=True)
class _Spent:
    """Processor seconds of a process so far; by thread, if it is an instance."""

    seconds: float
    threads: dict[int, float] | None


def _spent(root: psutil.Process) -> dict[int, _Spent]:
    """Of each of the cluster's processes, and of this one."""
    found = {os.getpid(): _Spent(time.process_time(), None)}
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            threads = None
            if "InstanceProcess" in " ".join(process.cmdline()[:1]):
                threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
            found[process.pid] = _Spent(_process_seconds(process.pid), threads)
    return found


def _process_seconds(process_id: int) -> float:
    """To the nanosecond. What the system says of threads is cut to hundredths, too coarse for light work's many."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(process_id, ctypes.byref(clock)) != 0:
        raise psutil.NoSuchProcess(process_id)
    return time.clock_gettime(clock.value)


def _cpu(before: Mapping[int, _Spent], after: Mapping[int, _Spent], num_threads: int) -> Cpu:
    """What was spent between two looks. An instance's engine is the ``num_threads`` threads that did most."""
    light = 0.0
    instances: dict[int, tuple[float, float]] = {}
    nothing = _Spent(0.0, {})
    for process_id, now in after.items():
        then = before.get(process_id, nothing)
        seconds = now.seconds - then.seconds
        if now.threads is None:
            light += seconds
            continue
        spent = [total - (then.threads or {}).get(thread_id, 0.0) for thread_id, total in now.threads.items()]
        engine = sum(sorted(spent)[-num_threads:])
        instances[process_id] = (engine, max(0.0, seconds - engine))
    return Cpu(light, instances)
