"""Holds the simulator against our own cluster on this machine: attainment, median TTFT and median TPOT.

    python -m benchmarks.fidelity_cpu.run --model MODEL            # from the repository's root; about 25 minutes
    python -m benchmarks.fidelity_cpu.run --model MODEL --quick    # a rehearsal
    python -m benchmarks.fidelity_cpu.run --model MODEL --deployment "2 mixed"   # this one anew, the others kept
    python -m benchmarks.fidelity_cpu.run --again                  # predict anew what is committed, without measuring

MODEL is what `python benchmarks/make_model.py MODEL` writes. Before each deployment `distserve profile` is taken, which
sends no Poisson arrivals. From it the simulator says the deployment's goodput for each length mix; then the deployment
is served as `distserve serve` does it and asked by `distserve bench`, a process of its own, at 0.6, 1 and 1.2 times
that goodput. The same requests, with the same arrivals and lengths, go through the simulator. Everything shares this
machine's cores: instances, router, API and client, which the simulator accounts for.

Between the runs a short closed loop, a probe, shows how fast the machine is now against its profile. A run is predicted
at the mean of the speeds before and after it, and is taken again where the two differ, whatever its figures are.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common.load import LoadError, bench
from benchmarks.common.machine import OtherLoad, describe_run
from benchmarks.common.progress import say
from benchmarks.common.servers import ServerError, free_port, running, unwind_on_sigterm
from benchmarks.fidelity_cpu import timelines
from benchmarks.fidelity_cpu.predict import (
    KV_TOKENS,
    MIXES,
    SCHEDULER,
    Figures,
    Mix,
    cluster_model,
    find_goodput,
    objective,
    predict,
)
from benchmarks.fidelity_cpu.probes import Prober, probed_speed
from benchmarks.fidelity_cpu.report import write_report
from benchmarks.fidelity_cpu.speed import PROFILED, Speed, workload_of
from distserve.core.config import SLO, Role
from distserve.core.errors import DistserveError
from simulator.latency.measured import ProfileLatencyModel

RESULTS = Path(__file__).parent / "results"
DEPLOYMENTS = {
    "1 prefill + 1 decode": {Role.PREFILL: 1, Role.DECODE: 1},
    "2 prefill + 1 decode": {Role.PREFILL: 2, Role.DECODE: 1},
    "2 mixed": {Role.MIXED: 2},
}
SHARES = {"below": 0.6, "at": 1.0, "above": 1.2}
"""Rates, as shares of the goodput that the simulator predicts."""
DTYPE = "bfloat16"
_DISTSERVE = Path(sys.executable).with_name("distserve")
_MIN_OUTPUT = 2
_ATTEMPTS = 3
"""At a run during which the machine's speed did not change."""


@dataclass(frozen=True)
class Case:
    """One measured run: deployment, mix, rate in requests/s, and the seed of its arrivals and lengths."""

    deployment: str
    mix: Mix
    level: str
    rate: float
    seed: int
    slo: SLO

    @property
    def stem(self) -> str:
        """Part of file names."""
        return file_stem(f"{self.deployment} {self.mix.name} {self.level}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory that benchmarks/make_model.py wrote")
    parser.add_argument("--profile", type=Path, help="use this profile in place of taking one")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=36.0, help="of arrivals in each run")
    parser.add_argument("--deployment", action="append", choices=list(DEPLOYMENTS), help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="thin profile, short runs, to try it out")
    parser.add_argument("--again", action="store_true", help="read the measured runs in --output-dir, predict anew")
    return parser.parse_args()


def main() -> int:
    """Measure, predict, compare, write; 1 if something is out of bounds."""
    unwind_on_sigterm()
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        if options.again:
            result = json.loads((options.output_dir / "result.json").read_text())
            compare_again(result, options.output_dir)
        elif options.model is None:
            print("error: give --model, or --again", file=sys.stderr)
            return 2
        else:
            result = {**describe_run("benchmarks.fidelity_cpu.run"), "runs": kept_runs(options)}
            measure(result, options)
    except (DistserveError, LoadError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    num_missed = write_report(options.output_dir, result)
    print((options.output_dir / "README.md").read_text())
    return 1 if num_missed else 0


def kept_runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What an earlier invocation measured of deployments that are not asked for."""
    path = options.output_dir / "result.json"
    if not options.deployment or not path.exists():
        return []
    return [run for run in json.loads(path.read_text())["runs"] if run["deployment"] not in options.deployment]


def take_profile(model: Path, output: Path, *, quick: bool) -> None:
    """``distserve profile`` as a user would."""
    from distserve.cluster.profile_command import profile

    say("profiling")
    options = ["--dtype", DTYPE, "--threads", "1", "--max-batch-tokens", str(SCHEDULER.max_batch_tokens)]
    options += ["--max-batch-size", str(SCHEDULER.max_batch_size), "--max-model-len", str(SCHEDULER.max_model_len)]
    options += ["--output", str(output), *(["--quick"] if quick else []), str(model)]
    profile.main(options, standalone_mode=False)


def profile_path(directory: Path, deployment: str) -> Path:
    """Where a deployment's profile is kept: how fast a machine is changes by the hour."""
    return directory / f"profile-{file_stem(deployment)}.json"


def file_stem(words: str) -> str:
    """``words`` as part of file names."""
    return words.replace(" + ", "-").replace(" ", "-")


def measure(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Every deployment in turn: its profile taken, its goodput predicted, then its runs measured and predicted.

    The table is written after each.
    """
    seconds = 10.0 if options.quick else options.seconds
    slos = {mix: SLO(**run["slo"]) for mix in MIXES for run in result["runs"] if run["mix"] == mix.name}
    for deployment, pools in DEPLOYMENTS.items():
        if options.deployment and deployment not in options.deployment:
            continue
        profile = profile_path(options.output_dir, deployment)
        if options.profile is None:
            take_profile(options.model, profile, quick=options.quick)
        else:
            shutil.copyfile(options.profile, profile)
        model = ProfileLatencyModel.read(profile)
        if not slos:
            slos = {mix: objective(model, mix) for mix in MIXES}
        cases = list(plan_cases(model, deployment, slos))
        with TemporaryDirectory() as directory, serving(options.model, pools, Path(directory)) as server:
            log = Path(directory) / "bench.log"
            bench(server.url, load_options(cases[0], 5.0, seed=0), log=log, may_miss=True)
            prober = Prober(server, model, pools, options.output_dir, file_stem(deployment), log)
            for case in cases:
                run = measure_case(case, seconds, prober)
                result["runs"].append({**run, "commit": result["commit"]})
                say(progress_line(run))
        result["runs"].sort(key=lambda run: list(DEPLOYMENTS).index(run["deployment"]))
        write_report(options.output_dir, result)


def measure_case(case: Case, seconds: float, prober: Prober) -> dict[str, Any]:
    """One run between two probes, again where the machine changed between them; and what is predicted of it."""
    attempts = 0
    before = after = prober.latest
    while attempts == 0 or (attempts < _ATTEMPTS and not before.speed.is_near(after.speed)):
        attempts += 1
        before = prober.latest
        with OtherLoad(prober.server) as other:
            options = load_options(case, seconds, case.seed)
            document = bench(prober.server.url, options, log=prober.log, may_miss=True)
        after = prober.probe()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    lines = timelines.rows(document["runs"][0]["requests"])
    timelines.write(prober.directory / f"{case.stem}.csv.gz", lines)
    run = compare(prober.model, prober.pools, case, lines, (before.speed, after.speed))
    probes = [before.file, after.file]
    return run | {"date": date, "probes": probes, "attempts": attempts, "other_load": other.cores}


def plan_cases(model: ProfileLatencyModel, deployment: str, slos: Mapping[Mix, SLO]) -> Iterator[Case]:
    """Below, at and above the predicted goodput, for each mix."""
    for index, (mix, slo) in enumerate(slos.items()):
        goodput = find_goodput(cluster_model(model, DEPLOYMENTS[deployment], mix.mean_prompt), mix, slo)
        say(f"{deployment}, {mix.name}: TTFT {slo.ttft:g} s, TPOT {slo.tpot:g} s, predicted goodput {goodput:.2f}/s")
        for level, share in SHARES.items():
            yield Case(deployment, mix, level, round(goodput * share, 2), 61 + index, slo)


def serving(model: Path, pools: dict[Role, int], directory: Path) -> Any:
    """The deployment, as ``distserve serve`` starts it."""
    port = free_port()
    command: list[str | Path] = [_DISTSERVE, "serve", model, "--dtype", DTYPE, "--threads", "1", "--port", str(port)]
    command += ["--kv-tokens", str(KV_TOKENS), "--max-model-len", str(SCHEDULER.max_model_len)]
    command += ["--max-batch-tokens", str(SCHEDULER.max_batch_tokens)]
    command += ["--max-batch-size", str(SCHEDULER.max_batch_size)]
    for role, count in pools.items():
        command += [f"--{role}", str(count)]
    return running("distserve", command, f"http://127.0.0.1:{port}", directory / "serve.log")


def load_options(case: Case, seconds: float, seed: int) -> dict[str, object]:
    """For ``distserve bench``."""
    return {
        "rate": case.rate,
        "duration": seconds,
        "prompt_len": case.mix.prompt_len,
        "output_len": case.mix.output_len,
        "seed": seed,
        "return_timeline": True,
        "timeout": 300,
    }


def compare(
    model: ProfileLatencyModel,
    pools: Mapping[Role, int],
    case: Case,
    lines: timelines.Lines,
    speeds: tuple[Speed, Speed],
) -> dict[str, Any]:
    """Measured and predicted figures of one run, on the arrivals and lengths that were sent.

    ``speeds`` are the machine's before and after it.
    """
    workload = workload_of(lines)

    def predicted(speed: Speed) -> Figures:
        return predict(cluster_model(model, pools, case.mix.mean_prompt, speed=speed), workload, case.slo)

    return {
        "deployment": case.deployment,
        "mix": case.mix.name,
        "level": case.level,
        "rate": case.rate,
        "seed": case.seed,
        "slo": asdict(case.slo),
        "num_requests": len(lines),
        "num_ok": sum(line["status"] == 200 for line in lines),
        "timelines": f"{case.stem}.csv.gz",
        "speeds": [asdict(speed) for speed in speeds],
        "measured": asdict(measured_figures(lines, case.slo)),
        "predicted": asdict(predicted(speeds[0].between(speeds[1]))),
        "predicted_as_profiled": asdict(predicted(PROFILED)),
    }


def measured_figures(lines: timelines.Lines, slo: SLO) -> Figures:
    """As :func:`benchmarks.fidelity_cpu.predict.figures`."""
    ok = [line for line in lines if line["status"] == 200]
    ttfts = [line["first_token"] - line["arrival"] for line in ok]
    tpots = [
        (line["finish"] - line["first_token"]) / (line["output_tokens"] - 1) if line["output_tokens"] > 1 else 0.0
        for line in ok
    ]
    met = sum(ttft <= slo.ttft and tpot <= slo.tpot for ttft, tpot in zip(ttfts, tpots, strict=True))
    several = [tpot for tpot, line in zip(tpots, ok, strict=True) if line["output_tokens"] >= _MIN_OUTPUT]
    return Figures(met / len(lines), float(np.median(ttfts)), float(np.median(several)))


def compare_again(result: dict[str, Any], directory: Path) -> None:
    """Replace the predictions in ``result`` by those of the simulator as it is now."""
    mixes = {mix.name: mix for mix in MIXES}
    for index, run in enumerate(result["runs"]):
        case = Case(run["deployment"], mixes[run["mix"]], run["level"], run["rate"], run["seed"], SLO(**run["slo"]))
        lines = timelines.read(directory / run["timelines"])
        model = ProfileLatencyModel.read(profile_path(directory, case.deployment))
        pools = DEPLOYMENTS[case.deployment]
        before, after = (probed_speed(model, pools, timelines.read(directory / file)) for file in run["probes"])
        again = compare(model, pools, case, lines, (before, after))
        result["runs"][index] = run | again


def progress_line(run: dict[str, Any]) -> str:
    """One run, in short."""
    measured, predicted = Figures(**run["measured"]), Figures(**run["predicted"])
    speeds = ", ".join(f"{speed['prompts']:.3f}/{speed['decodes']:.3f}" for speed in run["speeds"])
    return (
        f"{run['deployment']}, {run['mix']}, {run['level']} ({run['rate']:.2f}/s, {run['num_requests']} requests, "
        f"other load {run['other_load']:.2f}, speeds {speeds}): "
        f"attainment {measured.attainment:.1%} / {predicted.attainment:.1%}, TTFT "
        f"{measured.ttft * 1e3:.1f} / {predicted.ttft * 1e3:.1f} ms, TPOT {measured.tpot * 1e3:.2f} / "
        f"{predicted.tpot * 1e3:.2f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
