"""The deployments whose figures are compared: DistServe's, ours, and the baseline with one thing changed at a time."""

import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.goodput.distserve_published import MII_BATCH_TOKENS, PUBLISHED, SMALL_BATCH_TOKENS, VLLM_BATCH_TOKENS
from benchmarks.paper_cases.run import POLICIES, case_problem, vllm_problem
from distserve.bench.traces import Trace
from distserve.core.config import ParallelConfig, PrefillPolicy, Role
from distserve.core.latency import StepShape, StepTime
from placement.candidates import Candidate
from placement.deployment import joint_model
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import Shape, find_shapes
from simulator.latency.analytic import AnalyticModel
from simulator.latency.interface import LatencyModel
from simulator.model import ClusterModel
from simulator.results import Timelines
from simulator.simulation import simulate

SERVER_SECONDS = 0.01
"""What vLLM's server took for a token beside its measured steps, by DeepSpeed-FastGen's figures (see the README)."""
PAPER_CASES = Path(__file__).parents[1] / "paper_cases" / "results"
SHORT_ANSWER = 5
"""Tokens."""
_POOL = re.compile(r"(\d+) (prefill|decode|mixed) TP(\d+)(?: PP(\d+))?( \(whole prompts\))?")
_SPAN = re.compile(r"over (\d+) nodes")


@dataclass(frozen=True)
class Served:
    """Another source's step times, every step longer by what a server adds to it (``overhead``, seconds)."""

    latency: LatencyModel
    overhead: float

    @property
    def source(self) -> str:
        """Where the figures come from."""
        return f"{self.latency.source}, {self.overhead} s more a step"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:
        """See LatencyModel."""
        return ServedStepTime(self.latency.step_time(parallel, stages_share_node=stages_share_node), self.overhead)


@dataclass(frozen=True)
class ServedStepTime:
    """See Served."""

    step_time: StepTime
    overhead: float

    def seconds(self, shape: StepShape) -> float:
        """Seconds of one stage."""
        return self.step_time.seconds(shape) + self.overhead

    def handover(self, shape: StepShape) -> float:
        """Seconds between stages."""
        return self.step_time.handover(shape)


@dataclass(frozen=True)
class System:
    """A placement, at the speed of its problem's step times."""

    name: str
    problem: Problem
    candidate: Candidate
    runs: dict[tuple[float, int, int], Timelines] = field(default_factory=dict, repr=False)
    """What was simulated already: other limits are held against the same runs."""

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return self.candidate.num_gpus

    @cached_property
    def model(self) -> ClusterModel:
        """What is simulated."""
        placement = self.candidate.placement(self.problem)
        assert placement is not None, f"{self.candidate} does not fit the cluster"
        return joint_model(self.problem, placement)

    def with_short_answers(self, share: float) -> "System":
        """Of the outputs ``share`` are of a few tokens; the others are longer, so that their mean stays."""
        prompts, outputs = self.offered.sample
        rng = np.random.default_rng(0)
        is_short = rng.random(len(outputs)) < share
        factor = (1 - share * SHORT_ANSWER / outputs.mean()) / (1 - share)
        mixed = np.where(is_short, SHORT_ANSWER, np.rint(factor * outputs)).astype(np.int64)
        workload = replace(self.problem.workload, output=None, trace=Trace(prompts, mixed, None))
        return replace(self, problem=replace(self.problem, workload=workload), runs={})

    @cached_property
    def offered(self) -> Offered:
        """The workload's draws, the same for every system."""
        return Offered(self.problem.workload)

    def lone_prompt(self) -> float:
        """Seconds to the first token of a prompt of the 90th percentile of lengths, alone."""
        shape, _ = self.candidate.pools[0]
        length = int(np.quantile(self.offered.sample[0], 0.9))
        whole = StepShape(length, length * (length + 1) // 2, num_prefills=1)
        parallel = shape.parallel
        return parallel.pp * self.problem.latency.step_time(parallel).seconds(whole)

    def run(self, per_gpu: float, draw: int, num_requests: int) -> Timelines:
        """Everything answered of one draw at ``per_gpu`` requests/s and GPU."""
        key = (per_gpu, draw, num_requests)
        if key not in self.runs:
            offered = self.offered.at(per_gpu * self.num_gpus, draw, num_requests)
            self.runs[key] = simulate(self.model, offered).timelines
        return self.runs[key]


class Case:
    """One workload: problems at both speeds, and the placements that are compared."""

    def __init__(self, name: str, fits: Path | None) -> None:
        self.published = PUBLISHED[name]
        self.problem, self.paper = case_problem(name, fits, 1)
        if fits is None:
            self.problem = replace(self.problem, latency=self._analytic("distserve"))
            self.slow = replace(self.problem, latency=self._analytic("vllm-2023"))
        else:
            self.slow = vllm_problem(self.problem, fits)
        self._found = json.loads((PAPER_CASES / f"{name}.json").read_text(encoding="utf-8"))
        wide = replace(self.problem, search=replace(self.problem.search, policies=POLICIES))
        self._shapes, _ = find_shapes(wide, Offered(self.problem.workload))

    def _analytic(self, engine: str) -> AnalyticModel:
        return AnalyticModel(self.problem.model, self.problem.cluster, engine=engine)

    def mixed(self, policy: PrefillPolicy, tokens: int, tp: int | None = None) -> Candidate:
        """One colocated instance of the paper's baseline's shape, or of another."""
        parallel = ParallelConfig(tp or self.published.tp)
        kv = self.problem.kv(parallel, tokens)
        assert kv is not None
        size = self.problem.limits.max_batch_size
        return Candidate(((Shape(Role.MIXED, parallel, policy, kv, tokens, size, nodes=1), 1),))

    def planned(self, kind: str) -> Candidate:
        """What benchmarks/paper_cases found: ``disaggregated``, ``splitfuse``, ``whole_prompt``."""
        label = self._found[kind]["placement"]
        pools = [(self._shape(*groups), int(count)) for count, *groups in _POOL.findall(label)]
        span = _SPAN.search(label)
        return Candidate(tuple(pools), int(span[1]) if span else 1)

    def best_tp(self) -> int:
        """Tensor parallelism of the best single instance at vLLM's speed."""
        return int(_POOL.findall(self._found["vllm"]["placement"])[0][2])

    def _shape(self, role: str, tp: str, pp: str, whole: str) -> Shape:
        parallel = ParallelConfig(int(tp), int(pp or 1))
        policy = PrefillPolicy.WHOLE_PROMPT if whole else PrefillPolicy.SPLITFUSE
        return next(s for s in self._shapes if (s.role, s.parallel, s.policy) == (Role(role), parallel, policy))

    def systems(self) -> list[System]:
        """DistServe's placement and ours, and every baseline."""
        whole, split = PrefillPolicy.WHOLE_PROMPT, PrefillPolicy.SPLITFUSE
        fast, slow = self.problem, self.slow
        return [
            System("paper's placement", fast, self.paper),
            System("our placement", fast, self.planned("disaggregated")),
            System("vLLM of 2023", slow, self.mixed(whole, VLLM_BATCH_TOKENS)),
            System("same speed", fast, self.mixed(whole, VLLM_BATCH_TOKENS)),
            System("small batches", slow, self.mixed(whole, SMALL_BATCH_TOKENS)),
            System("SplitFuse", slow, self.mixed(split, MII_BATCH_TOKENS)),
            System("best shape", slow, self.mixed(whole, VLLM_BATCH_TOKENS, self.best_tp())),
            System(
                "served",
                replace(slow, latency=Served(slow.latency, SERVER_SECONDS)),
                self.mixed(whole, VLLM_BATCH_TOKENS),
            ),
            System("SplitFuse, same speed", fast, self.mixed(split, MII_BATCH_TOKENS)),
            System("our whole prompts", fast, self.planned("whole_prompt")),
            System("our SplitFuse", fast, self.planned("splitfuse")),
        ]
