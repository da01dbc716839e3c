"""Samples our processes under load and writes where their time goes to ``results/profile.md``.

    python -m benchmarks.cpu_vs_vllm.profile_instances --model /path/to/model --py-spy /path/to/py-spy

Three loads: prompts of 1024 tokens that saturate the prefill instance, 32 sequences that decode together, and one
alone. During each, the kernel's accounting says how much CPU every thread takes, and py-spy (a sampling profiler,
``pip install py-spy``) what the engine thread is doing: a sample belongs to the innermost function of this project on
its stack, native code and torch included.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import psutil

from benchmarks.common.machine import describe_run
from benchmarks.common.measure import Client
from benchmarks.common.servers import Server, unwind_on_sigterm
from benchmarks.common.systems import Bench

_SAMPLES_PER_SECOND = 200
_LEAST_SHARE = 0.01
_IDLE_SHARE = 0.99
_THREAD = re.compile(r"thread \((?P<id>\d+)\)(?:: (?P<name>.*))?")


@dataclass(frozen=True)
class Profile:
    """One process under one load.

    ``threads``: cores each thread kept busy, by its name. ``functions``: share of the engine thread's samples, by
    function; empty for a process without one.
    """

    process: str
    threads: Mapping[str, float]
    functions: Mapping[str, float]


def main() -> int:
    """Measure and write the page."""
    unwind_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory that make_model.py wrote")
    parser.add_argument("--py-spy", default=shutil.which("py-spy"), help="the program; default: the one on PATH")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "profile.md")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to sample each load")
    options = parser.parse_args()
    if not options.py_spy:
        parser.error("py-spy is not on PATH: pip install py-spy, or give it by --py-spy")
    facts = describe_run("benchmarks.cpu_vs_vllm.profile_instances")
    pages = []
    with TemporaryDirectory() as temporary:
        logs = Path(temporary)
        vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
        client = Client(vocab_size, logs / "bench.log")
        with Bench(options.model.resolve(), Path(), logs).ours() as server:
            client.ttft(server, 99, prompt_len=1024)
            loads: list[tuple[str, dict[str, object]]] = [
                ("8 clients, 1024 tokens in, 1 out", {"clients": 8, "prompt_len": 1024, "output_len": 1}),
                ("32 clients, 256 tokens in, 1024 out", {"clients": 32, "prompt_len": 256, "output_len": 1024}),
                ("1 client, 256 tokens in, 1024 out", {"clients": 1, "prompt_len": 256, "output_len": 1024}),
            ]
            for title, load in loads:
                settle = 6.0 if load["output_len"] != 1 else 2.0
                duration = {"duration": options.seconds + settle, "num_requests": None}
                asking = Thread(target=client.run, args=(server, 1, {**load, **duration}))
                asking.start()
                time.sleep(settle + 1.5)
                pages.append((title, profile(server, options.py_spy, options.seconds, logs)))
                asking.join()
    options.output.write_text(markdown(facts, pages))
    print(options.output.read_text())
    return 0


def profile(server: Server, py_spy: str, seconds: float, directory: Path) -> list[Profile]:
    """Every process that used a hundredth of a core or more, the busiest first."""
    processes = server.processes()
    recorders = {}
    for process in processes:
        if is_instance(process):
            output = directory / f"{process.pid}.raw"
            command = [py_spy, "record", "--pid", str(process.pid), "--threads", "--format", "raw", "--output"]
            command += [str(output), "--duration", str(int(seconds)), "--rate", str(_SAMPLES_PER_SECOND)]
            recorders[process.pid] = (
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
                output,
            )
    before, start = {p.pid: thread_times(p.pid) for p in processes}, time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start
    after = {p.pid: thread_times(p.pid) for p in processes}
    profiles = []
    for process in processes:
        names: dict[int, str] = {}
        functions: Counter[str] = Counter()
        if process.pid in recorders:
            recorder, output = recorders[process.pid]
            recorder.wait()
            names, functions = read_samples(output)
        threads: dict[str, float] = {}
        for thread, spent in after[process.pid].items():
            name = names.get(thread, "other threads")
            threads[name] = threads.get(name, 0.0) + spent - before[process.pid].get(thread, 0.0)
        total = functions.total() or 1
        profiles.append(
            Profile(
                label(process),
                {name: spent / elapsed for name, spent in sorted(threads.items(), key=lambda item: -item[1])},
                {name: num / total for name, num in functions.most_common()},
            )
        )
    busy = [p for p in profiles if sum(p.threads.values()) >= _LEAST_SHARE]
    return sorted(busy, key=lambda p: -sum(p.threads.values()))


def label(process: psutil.Process) -> str:
    """A name that a reader recognises."""
    words = process.cmdline()
    if is_instance(process):
        # Cores are handed out in the order of the pools, prefill first.
        return "prefill instance" if process.cpu_affinity() == [0] else "decode instance"
    if "serve" in words:
        return "API and launcher (distserve serve)"
    return process.name() if not words or words[0].startswith("ray::") else Path(words[0]).name


def is_instance(process: psutil.Process) -> bool:
    """Whether it is one of the two that compute; Ray sets the title."""
    return "ray::Instance" in " ".join(process.cmdline())


def thread_times(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process so far."""
    try:
        return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(pid).threads()}
    except psutil.NoSuchProcess:
        return {}


def read_samples(path: Path) -> tuple[dict[int, str], Counter[str]]:
    """Thread names by id, and the engine thread's samples by function, from py-spy's raw format."""
    names: dict[int, str] = {}
    functions: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        stack, _, num = line.rpartition(" ")
        head, *frames = stack.split(";")
        found = _THREAD.match(head)
        if found is None:
            continue
        name = found["name"] or "native threads"
        names[int(found["id"])] = name
        if name == "engine":
            ours = [frame for frame in frames if "distserve" in frame]
            functions[ours[-1].rpartition(":")[0] + ")" if ours else "(interpreter)"] += int(num)
    return names, functions


def markdown(facts: Mapping[str, object], pages: list[tuple[str, list[Profile]]]) -> str:
    """The page."""
    lines = [
        "# Where the time goes",
        "",
        f"{facts['date']}, {facts['cpu']}, {os.cpu_count()} cores, commit {facts['commit']}; `{facts['command']}`",
        "",
        "Cores: CPU time over wall-clock time. Shares: of the engine thread's samples, waiting for work included.",
    ]
    for title, profiles in pages:
        lines += ["", f"## {title}", "", "| process | thread | cores |", "|---|---|---:|"]
        for found in profiles:
            shown = {name: cores for name, cores in found.threads.items() if cores >= _LEAST_SHARE}
            lines += [f"| {found.process} | {name} | {cores:.2f} |" for name, cores in shown.items()]
        for found in profiles:
            shown = {name: share for name, share in found.functions.items() if share >= _LEAST_SHARE}
            if shown and not any(name.startswith("_run ") and share > _IDLE_SHARE for name, share in shown.items()):
                lines += ["", f"Engine thread of {found.process}:", "", "| function | share |", "|---|---:|"]
                lines += [f"| `{name}` | {share:.1%} |" for name, share in shown.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
