r"""Holds the simulator against a cluster of two hosts whose link carries 100 Mbit/s: KV transfers, TPOT and latency.

    python benchmarks/make_model.py MODEL --hidden-size 128 --layers 8 --heads 8 --kv-heads 8 --head-dim 128 \
        --intermediate-size 256 --vocabulary 2048
    python -m benchmarks.kv_transfer.slow_link --model MODEL        # from the repository's root, as root; 15 minutes
    python -m benchmarks.kv_transfer.slow_link --again              # predict anew what is committed, without measuring

That model has much KV for what it computes (32 KiB a token), so that it is the link that takes the time. The hosts are
network namespaces of this machine with a CPU each and a cable that the kernel limits (``common/two_hosts.py``); prefill
is on one, decode on the other, started by `distserve serve` on a Ray cluster of both and asked by `distserve bench`.
What predicts is the simulator, with ``inter_node_bandwidth: 12.5e6`` and step times that `distserve profile` takes just
before. It knows nothing else of the run but the arrivals and lengths of the requests. No figure is fitted.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common.load import LoadError, bench
from benchmarks.common.machine import describe_run
from benchmarks.common.servers import Server, ServerError, free_port, running, unwind_on_sigterm
from benchmarks.common.two_hosts import HostsError, TwoHosts, enter_namespace, plain_rate, ray_nodes, two_hosts
from benchmarks.fidelity_cpu import timelines
from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.errors import DistserveError
from distserve.core.topology import ClusterSpec, Gpu
from distserve.engine.description import describe
from simulator.latency.measured import ProfileLatencyModel
from simulator.model import ClusterModel, InstanceModel, KvGeometry
from simulator.simulation import simulate

LINK = 12.5e6
"""Bytes/s: 100 Mbit/s."""
BOUND = 0.10
DTYPE = "bfloat16"
KV_TOKENS = 32768
SCHEDULER = SchedulerConfig(max_batch_tokens=512, max_batch_size=64, max_model_len=2048)
RESULT = Path(__file__).with_name("slow_link.json")
_DISTSERVE = Path(sys.executable).with_name("distserve")
_FIGURES = ("transfer_mean", "transfer_median", "tpot_median", "latency_mean", "latency_median")
_CONFIG = f"""
placement:
  prefill: {{instances: 1, gpus: [[[0, 0]]]}}
  decode: {{instances: 1, gpus: [[[1, 0]]]}}
cluster: {{gpu: cpu, nodes: 2, gpus_per_node: 1, inter_node_bandwidth: {LINK}}}
engine:
  dtype: {DTYPE}
  threads: 1
  kv_tokens: {KV_TOKENS}
  max_model_len: {SCHEDULER.max_model_len}
  max_batch_tokens: {SCHEDULER.max_batch_tokens}
  max_batch_size: {SCHEDULER.max_batch_size}
"""


@dataclass(frozen=True)
class Load:
    """Lengths as ``distserve bench`` takes them, at ``rate`` requests/s, Poisson."""

    name: str
    rate: float
    prompt_len: str = "normal:mean=448,std=32,max=512"
    output_len: str = "normal:mean=8,std=1,max=12"


@dataclass(frozen=True)
class Figures:
    """Seconds: from the start of a KV transfer to its end, per output token after the first, per request."""

    transfer_mean: float
    transfer_median: float
    tpot_median: float
    latency_mean: float
    latency_median: float


LOADS = (Load("light", 0.15), Load("medium", 0.4))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory that benchmarks/make_model.py wrote")
    parser.add_argument("--profile", type=Path, help="use this profile in place of taking one")
    parser.add_argument("--seconds", type=float, default=90.0, help="of arrivals in each run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each load, with seeds of their own")
    parser.add_argument("--output", type=Path, default=RESULT, help="requests and figures; the profile goes beside it")
    parser.add_argument("--quick", action="store_true", help="a thin profile and one short run of each load")
    parser.add_argument("--again", action="store_true", help="read the measured runs in --output, predict anew")
    return parser.parse_args()


def main() -> int:
    """Measure, predict, compare; 1 if a figure is out of bounds."""
    options = parse_arguments()
    profile = options.output.with_suffix(".profile.json")
    if options.again:
        result = json.loads(options.output.read_text())
    elif options.model is None:
        print("error: give --model, or --again", file=sys.stderr)
        return 2
    else:
        enter_namespace("benchmarks.kv_transfer.slow_link")
        unwind_on_sigterm()
        result = {**describe_run("benchmarks.kv_transfer.slow_link"), "link": LINK}
        try:
            measure(result, options, profile)
        except (DistserveError, HostsError, LoadError, ServerError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    latency = ProfileLatencyModel.read(profile)
    for run in result["runs"]:
        compare(run, KvGeometry(**result["kv"]), latency)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["runs"]))
    return 1 if any(not run["is_within"] for run in result["runs"]) else 0


def take_profile(model: Path, output: Path, *, quick: bool) -> None:
    """``distserve profile`` as a user would."""
    from distserve.cluster.profile_command import profile

    say("profiling")
    options = ["--dtype", DTYPE, "--threads", "1", "--max-batch-tokens", str(SCHEDULER.max_batch_tokens)]
    options += ["--max-batch-size", str(SCHEDULER.max_batch_size), "--max-model-len", str(SCHEDULER.max_model_len)]
    profile.main(
        [*options, "--output", str(output), *(["--quick"] if quick else []), str(model)], standalone_mode=False
    )


def measure(result: dict[str, Any], options: argparse.Namespace, profile: Path) -> None:
    """The profile, then every load on one deployment."""
    seconds, repetitions = (30.0, 1) if options.quick else (options.seconds, options.repetitions)
    with TemporaryDirectory() as name, two_hosts(LINK) as hosts:
        directory = Path(name)
        result["plain_rate"] = plain_rate(hosts)
        say(f"a plain connection carries {result['plain_rate'] / 1e6:.2f} MB/s of {LINK / 1e6:.1f}")
        if options.profile is None:
            take_profile(options.model, profile, quick=options.quick)
        else:
            shutil.copyfile(options.profile, profile)
        result["kv"] = asdict(geometry(options.model))
        result["runs"] = []
        with serving(options.model, hosts, directory) as server:
            for load in LOADS:
                for seed in range(1, repetitions + 1):
                    document = bench(server.url, load_options(load, seconds, seed), log=directory / "bench.log")
                    lines = timelines.rows(document["runs"][0]["requests"])
                    busy = round(os.getloadavg()[0], 1)
                    result["runs"].append({"load": asdict(load), "seed": seed, "load_average": busy, "requests": lines})
                    say(f"{load.name}, seed {seed}, load average {busy}: {measured_figures(lines)}")


def geometry(model: Path) -> KvGeometry:
    """What a token of KV is."""
    layout = describe(model).layout(KvConfig(1), DTYPE)
    layers, heads = layout.num_layers, layout.num_kv_heads
    return KvGeometry(layers, heads, layout.token_bytes // (layers * heads))


@contextmanager
def serving(model: Path, hosts: TwoHosts, directory: Path) -> Iterator[Server]:
    """The deployment, warm."""
    config = directory / "serve.yaml"
    config.write_text(_CONFIG)
    port = free_port()
    command: list[str | Path] = [_DISTSERVE, "serve", model.resolve(), "--config", config, "--port", str(port)]
    with ray_nodes(hosts, ("0", "1")) as (address, environment):
        command += ["--ray-address", address]
        url = f"http://127.0.0.1:{port}"
        with running("distserve", command, url, directory / "serve.log", environment) as server:
            bench(url, load_options(LOADS[0], 10.0, seed=0), log=directory / "bench.log", may_miss=True)
            yield server


def load_options(load: Load, seconds: float, seed: int) -> dict[str, object]:
    """For ``distserve bench``."""
    lengths = {"prompt_len": load.prompt_len, "output_len": load.output_len}
    return {"rate": load.rate, "duration": seconds, **lengths, "seed": seed, "return_timeline": True, "timeout": 300}


def compare(run: dict[str, Any], kv: KvGeometry, latency: ProfileLatencyModel) -> None:
    """Add measured and predicted figures to a run, on the arrivals and lengths that were sent."""
    lines = run["requests"]
    workload = Workload(
        np.array([line["prompt_tokens"] for line in lines]),
        np.array([line["output_tokens"] for line in lines]),
        np.array([line["arrival"] for line in lines]),
    )
    measured, predicted = measured_figures(lines), predict(kv, latency, workload)
    run["measured"], run["predicted"] = asdict(measured), asdict(predicted)
    run["ratios"] = {name: getattr(predicted, name) / getattr(measured, name) for name in _FIGURES}
    run["is_within"] = all(abs(ratio - 1) <= BOUND for ratio in run["ratios"].values())


def predict(kv: KvGeometry, latency: ProfileLatencyModel, workload: Workload) -> Figures:
    """What the simulator says of the two hosts and the link between them."""
    pool = KvConfig(KV_TOKENS // latency.profile.block_size, latency.profile.block_size)
    step_time = latency.step_time(ParallelConfig())
    specs = [InstanceSpec(f"{role}-0", role, pool, SCHEDULER) for role in (Role.PREFILL, Role.DECODE)]
    deployment = ClusterModel(
        instances=tuple(InstanceModel(spec, step_time, (Gpu(node, 0),)) for node, spec in enumerate(specs)),
        cluster=ClusterSpec("cpu", 2, 1, 10e9, LINK),
        kv=kv,
        delays=latency.delays(tuple(spec.instance_id for spec in specs), float(workload.prompt_lens.mean())),
        host=latency.host(),
    )
    found = simulate(deployment, workload).timelines
    return figures(found.migration_end - found.migration_start, found.tpot, found.latency)


def measured_figures(lines: Sequence[dict[str, Any]]) -> Figures:
    """Of the client's and the instances' times."""
    return figures(
        np.array([line["migration_end"] - line["migration_start"] for line in lines]),
        np.array([(line["finish"] - line["first_token"]) / (line["output_tokens"] - 1) for line in lines]),
        np.array([line["finish"] - line["arrival"] for line in lines]),
    )


def figures(transfers: np.ndarray, tpots: np.ndarray, latencies: np.ndarray) -> Figures:
    """Means and medians."""
    return Figures(
        float(transfers.mean()),
        float(np.median(transfers)),
        float(np.median(tpots)),
        float(latencies.mean()),
        float(np.median(latencies)),
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Each load as lines of Markdown: medians over its runs, and the ratios of all of them."""
    lines = ["| load | figure | measured | predicted | predicted / measured, by run |", "|---|---|---:|---:|---|"]
    for load in LOADS:
        of_load = [run for run in runs if run["load"]["name"] == load.name]
        for name in _FIGURES:
            measured, predicted = (
                statistics.median(run[kind][name] for run in of_load) for kind in ("measured", "predicted")
            )
            ratios = ", ".join(f"{run['ratios'][name]:.2f}" for run in of_load)
            lines.append(
                f"| {load.name} ({load.rate:g}/s) | {name.replace('_', ' ')} | {measured:.3f} s | {predicted:.3f} s "
                f"| {ratios} |"
            )
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
