"""The token budget of a step (``SchedulerConfig.max_batch_tokens``): what it must be at least, what it is best.

A step's tokens share the reading of the weights, so tokens per second rise with their number until computation takes
longer than memory, and hardly from there on; a larger budget then only delays whoever decodes beside the prompts
(DeepSpeed-FastGen, section 3; DistServe's ``L_m``).
"""

from collections.abc import Callable

from distserve.core.config import InstanceSpec, PrefillPolicy, Role
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape, StepTime

SATURATED = 0.9
"""Share of the best throughput from which on it counts as saturated."""


def check_budget(spec: InstanceSpec) -> None:
    """Raise ConfigError if the instance's step is too small for what must go into one."""
    scheduler, block_size = spec.scheduler, spec.kv.block_size
    budget = scheduler.max_batch_tokens
    if spec.role is not Role.DECODE and budget < block_size:
        raise ConfigError(
            f"{spec.instance_id}: a step of max_batch_tokens = {budget} is smaller than a KV block of {block_size} "
            f"tokens: raise max_batch_tokens to {block_size} or more, or lower block_size"
        )
    is_shared = spec.role is Role.MIXED and scheduler.policy is PrefillPolicy.SPLITFUSE
    if is_shared and budget < scheduler.max_batch_size:
        raise ConfigError(
            f"{spec.instance_id}: a step of max_batch_tokens = {budget} has no room for a token of each of the "
            f"max_batch_size = {scheduler.max_batch_size} sequences that may run: raise max_batch_tokens to "
            f"{scheduler.max_batch_size} or more, or lower max_batch_size to {budget} or less"
        )


def saturating_budget(step_time: StepTime, *, prompt_len: int, least: int, most: int, granularity: int = 16) -> int:
    """The smallest budget whose prompt throughput is within :data:`SATURATED` of the best.

    Budgets are multiples of ``granularity`` in ``least .. most`` (``least`` itself, rounded up, if it saturates).
    Throughput is that of steps full of prompts of ``prompt_len`` tokens: what attention costs a token is then the same
    for every budget, and only the sharing of weights is left to differ.

    Raises:
        ConfigError: ``most`` leaves no budget.
    """
    first = -(-least // granularity) * granularity
    if first > most:
        raise ConfigError(
            f"no token budget is at least {least} and at most the {most} tokens that were measured: profile with a "
            "larger max_batch_tokens, or lower max_batch_size"
        )
    budgets = range(first, most + 1, granularity)
    rate = prompt_rate(step_time, prompt_len)
    best = max(rate(budget) for budget in budgets)
    return next(budget for budget in budgets if rate(budget) >= SATURATED * best)


def prompt_rate(step_time: StepTime, prompt_len: int) -> Callable[[int], float]:
    """Prompt tokens per second in steps of so many tokens, all of prompts of ``prompt_len`` tokens."""

    def rate(num_tokens: int) -> float:
        pairs = num_tokens * (prompt_len + 1) // 2
        num_prompts = max(1, round(num_tokens / prompt_len))
        return num_tokens / step_time.seconds(StepShape(num_tokens, pairs, num_prefills=num_prompts))

    return rate
