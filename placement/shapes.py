"""Which shapes an instance of each role can have: what fits memory, splits evenly and has known step times."""

from dataclasses import dataclass, replace

import numpy as np

from distserve.core.budget import check_budget
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape, StepTime
from placement.offered import Offered
from placement.problem import Problem

_BUDGETS = (512, 1024, 2048, 4096, 8192)
_SATURATED = 0.9
_VLLM_BUDGET = 2560
"""``max_num_batched_tokens`` of the whole-prompt schedulers of 2023 (vLLM 0.2)."""


@dataclass(frozen=True)
class Shape:
    """One kind of instance: ``tp`` x ``pp``, its memory and its batch.

    ``nodes`` is how many nodes an instance spans at least.
    """

    role: Role
    parallel: ParallelConfig
    policy: PrefillPolicy
    kv: KvConfig
    max_batch_tokens: int
    max_batch_size: int
    nodes: int

    @property
    def num_gpus(self) -> int:
        """GPUs of one instance."""
        return self.parallel.num_ranks

    def spec(self, problem: Problem, instance_id: str) -> InstanceSpec:
        """The specification of an instance of this shape."""
        limits = problem.limits
        scheduler = SchedulerConfig(
            max_batch_tokens=self.max_batch_tokens,
            max_batch_size=self.max_batch_size,
            max_in_flight=self.parallel.pp,
            max_model_len=limits.max_model_len,
            policy=self.policy,
        )
        return InstanceSpec(instance_id, self.role, self.kv, scheduler, self.parallel)

    def __str__(self) -> str:
        name = f"{self.role} TP{self.parallel.tp}"
        if self.parallel.pp > 1:
            name += f" PP{self.parallel.pp}"
        if self.role is Role.MIXED and self.policy is PrefillPolicy.WHOLE_PROMPT:
            name += " (whole prompts)"
        return name


@dataclass(frozen=True, slots=True)
class Refusal:
    """A shape that cannot be, and why: ``memory``, ``shape`` or ``batch`` (its steps). ``role`` None: in any role."""

    parallel: ParallelConfig
    constraint: str
    reason: str
    role: Role | None = None


def parallel_configs(problem: Problem) -> list[ParallelConfig]:
    """Every tp within a node and pp that splits the layers evenly and fits the cluster, fewest GPUs first."""
    cluster = problem.cluster
    found = [
        ParallelConfig(tp, pp)
        for tp in range(1, cluster.gpus_per_node + 1)
        for pp in range(1, problem.search.max_pp + 1)
        if problem.model.num_layers % pp == 0 and nodes_spanned(problem, ParallelConfig(tp, pp)) <= cluster.num_nodes
    ]
    return sorted(found, key=lambda parallel: (parallel.num_ranks, parallel.pp))


def nodes_spanned(problem: Problem, parallel: ParallelConfig) -> int:
    """Nodes one instance takes when every stage is within a node and stages are packed."""
    return -(-parallel.pp // (problem.cluster.gpus_per_node // parallel.tp))


def find_shapes(problem: Problem, offered: Offered) -> tuple[list[Shape], list[Refusal]]:
    """Every possible kind of instance, and what was refused."""
    shapes: list[Shape] = []
    refused: list[Refusal] = []
    for parallel in parallel_configs(problem):
        nodes = nodes_spanned(problem, parallel)
        try:
            problem.model.check(parallel)
            step_time = problem.latency.step_time(parallel, stages_share_node=nodes == 1)
        except ConfigError as error:
            refused.append(Refusal(parallel, "shape", str(error)))
            continue
        kinds = [(Role.PREFILL, PrefillPolicy.SPLITFUSE), (Role.DECODE, PrefillPolicy.SPLITFUSE)]
        kinds += [(Role.MIXED, policy) for policy in problem.search.policies]
        for role, policy in kinds:
            tokens = _batch_tokens(problem, offered, role, policy, parallel, step_time)
            kv = problem.kv(parallel, max(tokens, problem.limits.max_batch_size))
            if kv is None:
                gigabytes = problem.model.weight_bytes(parallel) / 1e9
                asked = problem.limits.kv_tokens or problem.limits.kv_memory
                room = "the KV memory asked for" if asked else "KV"
                reason = (
                    f"TP{parallel.tp} PP{parallel.pp}: {gigabytes:.0f} GB of weights per GPU leave no room for {room}"
                )
                refused.append(Refusal(parallel, "memory", reason, role))
                continue  # another role has other steps, and may leave room
            shape = Shape(role, parallel, policy, kv, tokens, problem.limits.max_batch_size, nodes)
            try:
                check_budget(shape.spec(problem, f"{role} instance"))
            except ConfigError as error:
                refused.append(Refusal(parallel, "batch", str(error), role))
                continue
            shapes.append(shape)
    return shapes, refused


def _batch_tokens(
    problem: Problem,
    offered: Offered,
    role: Role,
    policy: PrefillPolicy,
    parallel: ParallelConfig,
    step_time: StepTime,
) -> int:
    """Tokens per step.

    Prefill: where throughput saturates (DistServe's ``L_m``), within half the TTFT, but no less than nine of ten
    prompts need. SplitFuse: the largest step that keeps a few decodes within the TPOT. Whole prompts: vLLM's own.
    """
    limits = problem.limits
    prompts, _ = offered.sample
    mean = float(prompts.mean())
    if role is Role.DECODE:
        return limits.max_batch_size
    if role is Role.PREFILL:
        if limits.prefill_batch_tokens is not None:
            return limits.prefill_batch_tokens
        needed = next((b for b in _BUDGETS if b >= np.quantile(prompts, 0.9)), _BUDGETS[-1])
        best = _BUDGETS[-1] / step_time.seconds(_prompts(_BUDGETS[-1], mean))
        chosen = needed
        for budget in (b for b in _BUDGETS if b > needed):
            seconds = step_time.seconds(_prompts(budget, mean))
            is_saturated = chosen / step_time.seconds(_prompts(chosen, mean)) >= _SATURATED * best
            if is_saturated or seconds * parallel.pp > problem.slo.ttft / 2:
                break
            chosen = budget
        return chosen
    if limits.mixed_batch_tokens is not None:
        return limits.mixed_batch_tokens
    if policy is PrefillPolicy.WHOLE_PROMPT:
        return _VLLM_BUDGET
    chosen, *larger = [budget for budget in _BUDGETS if budget >= limits.max_batch_size] or [limits.max_batch_size]
    for budget in larger:
        batch = replace(_prompts(budget, mean), num_decodes=16, decode_context=int(16 * mean))
        if parallel.pp * step_time.seconds(batch) > problem.slo.tpot:
            break
        chosen = budget
    return chosen


def _prompts(num_tokens: int, mean: float) -> StepShape:
    """A step of ``num_tokens`` prompt tokens in prompts of ``mean`` tokens."""
    length = min(mean, num_tokens)
    return StepShape(num_tokens, int(num_tokens * (length + 1) / 2), num_prefills=max(round(num_tokens / length), 1))
