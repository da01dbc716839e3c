"""DistServe's cases under our planner: our choice, the paper's and the colocated best, in the same simulator.

    python benchmarks/paper_cases/run.py --fits DIR

For every case of ``deploy/examples`` the planner is run with the paper's placement as a rival and both kinds of mixed
instances. Step times are DistServe's own A100 fits where they exist (OPT-13B and 66B; ``--fits`` is the directory of
``profiler-a100-80g.*.json`` from its repository, simdistserve/estimators/profile_data), analytic elsewhere.

Whole-prompt mixed instances are what the paper's vLLM was, scheduling apart from speed. The paper's baseline ran vLLM's
own kernels of 2023; a second comparison is with that: one colocated instance with vLLM's step times (its fits by
DistServe's authors; for OPT-175B the analytic times, slowed as the fits say vLLM is at OPT-66B).
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distserve.core.config import ParallelConfig, PrefillPolicy
from distserve.core.latency import StepShape, StepTime
from placement.candidates import Candidate, Kind, spans
from placement.config import Overrides, given_candidate, load_problem
from placement.plan import Evaluation, Plan, UnreachableError
from placement.problem import Problem
from placement.search import find_plan
from simulator.latency.distserve_profile import DistServeProfile
from simulator.latency.interface import LatencyModel

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "deploy" / "examples"
CASES = ("opt-13b-sharegpt", "opt-66b-sharegpt", "opt-66b-humaneval", "opt-66b-longbench", "opt-175b-sharegpt")
POLICIES = (PrefillPolicy.SPLITFUSE, PrefillPolicy.WHOLE_PROMPT)
PAPER_RANGE = (1.6, 4.6)
_TYPICAL = StepShape(num_decodes=32, decode_context=32 * 900)
_PROMPT = StepShape(num_prefill_tokens=755, prefill_pairs=755 * 378, num_prefills=1)


@dataclass(frozen=True)
class Slowed:
    """Another source's step times, prompts ``prefill`` and decodes ``decode`` times as long."""

    latency: LatencyModel
    prefill: float
    decode: float

    @property
    def source(self) -> str:
        """Where the figures come from."""
        return f"{self.latency.source}, prompts x {self.prefill:.2f}, decodes x {self.decode:.2f} as vLLM's fits"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:
        """See LatencyModel."""
        return SlowedStepTime(self.latency.step_time(parallel, stages_share_node=stages_share_node), self)


@dataclass(frozen=True)
class SlowedStepTime:
    """See Slowed."""

    step_time: StepTime
    slowed: Slowed

    def seconds(self, shape: StepShape) -> float:
        """Seconds of one stage."""
        factor = self.slowed.prefill if shape.num_prefill_tokens else self.slowed.decode
        return factor * self.step_time.seconds(shape)

    def handover(self, shape: StepShape) -> float:
        """Seconds between stages."""
        return self.step_time.handover(shape)


def case_problem(name: str, fits: Path | None, workers: int) -> tuple[Problem, Candidate]:
    """The example's problem with the best source of step times, and the paper's placement."""
    problem = load_problem(EXAMPLES / f"{name}.yaml", Overrides(num_workers=workers))
    file = fits / "profiler-a100-80g.distserve.json" if fits else None
    if file is not None and problem.model.name in file.read_text(encoding="utf-8"):
        problem = replace(problem, latency=DistServeProfile.load(file, problem.model.name))
    problem = replace(problem, search=replace(problem.search, policies=POLICIES))
    paper = given_candidate(EXAMPLES / f"{name}.yaml", problem)
    assert paper is not None
    (prefill, _), (decode, _) = paper.pools
    return problem, replace(paper, span=spans(problem, prefill, decode)[-1])


def vllm_problem(problem: Problem, fits: Path) -> Problem:
    """The same with the step times of the vLLM of 2023, colocated with whole prompts only."""
    file = fits / "profiler-a100-80g.vllm.json"
    if problem.model.name in file.read_text(encoding="utf-8"):
        latency: LatencyModel = DistServeProfile.load(file, problem.model.name)
    else:
        ours, theirs = (
            DistServeProfile.load(fits / f"profiler-a100-80g.{engine}.json", "opt-66b").step_time(ParallelConfig(4, 1))
            for engine in ("distserve", "vllm")
        )
        latency = Slowed(
            problem.latency,
            theirs.seconds(_PROMPT) / ours.seconds(_PROMPT),
            theirs.seconds(_TYPICAL) / ours.seconds(_TYPICAL),
        )
    search = replace(problem.search, policies=(PrefillPolicy.WHOLE_PROMPT,))
    return replace(problem, latency=latency, search=search)


def best(plan: Plan, kind: Kind, policy: PrefillPolicy | None = None) -> Evaluation | None:
    """The finalist of a kind with the best goodput per GPU."""
    found = [e for e in plan.finalists if e.kind is kind and (policy is None or e.policy is policy)]
    return max(found, key=lambda e: e.goodput_per_gpu, default=None)


def row(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """One placement's figures."""
    if evaluation is None:
        return None
    gpus = evaluation.num_gpus
    return {
        "placement": evaluation.label,
        "gpus": gpus,
        "goodput_per_gpu": evaluation.goodput_per_gpu,
        "low": evaluation.goodput.low / gpus,
        "high": evaluation.goodput.high / gpus,
        "binding": evaluation.binding,
    }


def cpu_time() -> float:
    """Seconds of processor time this process and its ended children took."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_case(name: str, fits: Path | None, workers: int, *, timed: bool) -> dict[str, Any]:
    """All comparisons of one case; ``timed``: and how long the planner alone takes, without rivals."""
    problem, paper = case_problem(name, fits, workers)
    seconds = cpu_seconds = None
    if timed:
        began, cpu_began = time.perf_counter(), cpu_time()
        find_plan(replace(problem, search=replace(problem.search, policies=POLICIES[:1])))
        seconds, cpu_seconds = time.perf_counter() - began, cpu_time() - cpu_began
    wide = find_plan(problem, paper=paper)
    ours, theirs = best(wide, Kind.DISAGGREGATED), wide.paper
    whole = best(wide, Kind.COLOCATED, PrefillPolicy.WHOLE_PROMPT)
    result: dict[str, Any] = {
        "case": name,
        "slo": asdict(problem.slo),
        "latency": problem.latency.source,
        "planning_seconds": seconds,
        "planning_cpu_seconds": cpu_seconds,
        "chosen": row(wide.chosen),
        "disaggregated": row(ours),
        "paper": row(theirs),
        "splitfuse": row(best(wide, Kind.COLOCATED, PrefillPolicy.SPLITFUSE)),
        "whole_prompt": row(whole),
        "vllm": None,
    }
    if fits is not None:
        result["vllm"] = row(vllm_of_2023(vllm_problem(problem, fits)))
    return result


def vllm_of_2023(problem: Problem) -> Evaluation | None:
    """The best single instance of vLLM's scheduler at its own speed: the paper's baseline has no router."""
    try:
        return find_plan(replace(problem, search=replace(problem.search, num_finalists=1, max_instances=1))).colocated
    except UnreachableError:
        return None


def ratio(result: dict[str, Any], baseline: str) -> float | None:
    """Disaggregated over colocated goodput per GPU."""
    ours, other = result["disaggregated"], result[baseline]
    return ours["goodput_per_gpu"] / other["goodput_per_gpu"] if ours and other else None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    heads = [
        "case",
        "our choice",
        "best disaggregated",
        "the paper's",
        "SplitFuse",
        "whole prompts",
        "vLLM's speed",
        "disaggregated / whole prompts",
        "disaggregated / vLLM's speed",
        "plans in",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return "none"
        return (
            f"{entry['goodput_per_gpu']:.3f} ({entry['low']:.3f}-{entry['high']:.3f}): "
            f"{entry['placement']}, {entry['gpus']} GPUs"
        )

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    for result in results:
        columns = [result["case"]]
        columns += [
            cell(result[key]) for key in ("chosen", "disaggregated", "paper", "splitfuse", "whole_prompt", "vllm")
        ]
        columns += [times(ratio(result, "whole_prompt")), times(ratio(result, "vllm"))]
        seconds, cpu = result["planning_seconds"], result["planning_cpu_seconds"]
        columns.append("-" if seconds is None else f"{seconds:.0f} s ({cpu:.0f} s of CPU)")
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the cases and write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=Path, help="directory of DistServe's profiler-a100-80g.*.json")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timed", action="store_true", help="time the planner alone, too")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    for name in options.cases:
        result = run_case(name, options.fits, options.workers, timed=options.timed)
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table([result]), flush=True)
    found = [options.output / f"{name}.json" for name in CASES]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    (options.output / "report.md").write_text(
        f"# Goodput per GPU (requests/s), 95% interval\n\nPaper, against vLLM: {PAPER_RANGE[0]}-{PAPER_RANGE[1]}x.\n\n"
        f"{table(results)}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
