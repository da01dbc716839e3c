"""The token budget: what is refused, and what is chosen from step times."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.budget import SATURATED, check_budget, prompt_rate, saturating_budget
from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import LinearStepTime, StepShape


@dataclass(frozen=True)
class Roofline:
    """A step reads the weights in ``memory`` seconds or computes ``per_token`` each, whichever takes longer."""

    memory: float
    per_token: float

    def seconds(self, shape: StepShape) -> float:
        return max(self.memory, self.per_token * shape.num_prefill_tokens)

    def handover(self, shape: StepShape) -> float:
        return 0.0


def spec(role: Role, budget: int, *, size: int = 32, block: int = 16, policy: str = "splitfuse") -> InstanceSpec:
    config = SchedulerConfig(max_batch_tokens=budget, max_batch_size=size, policy=PrefillPolicy(policy))
    return InstanceSpec(f"{role}-0", role, KvConfig(100, block), config)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
def test_a_budget_below_a_block_is_refused(role: Role) -> None:
    check_budget(spec(role, 16, size=8))
    with pytest.raises(ConfigError, match=f"{role}-0.*15 is smaller than a KV block of 16 tokens: raise.*lower block"):
        check_budget(spec(role, 15, size=8))


def test_a_budget_below_the_running_decodes_is_refused_where_they_share_it() -> None:
    check_budget(spec(Role.MIXED, 32))
    with pytest.raises(ConfigError, match=r"31 has no room .* = 32 .* lower max_batch_size to 31 or less"):
        check_budget(spec(Role.MIXED, 31))
    check_budget(spec(Role.PREFILL, 31))
    check_budget(spec(Role.DECODE, 1))
    check_budget(spec(Role.MIXED, 31, policy="whole"))


@given(knee=st.integers(20, 1500), memory=st.floats(1e-3, 1.0))
def test_the_budget_is_where_a_roofline_bends(knee: int, memory: float) -> None:
    budget = saturating_budget(Roofline(memory, memory / knee), prompt_len=512, least=16, most=2048)
    wanted = max(16, SATURATED * knee)
    assert wanted - 1e-6 <= budget <= wanted + 16


@given(
    base=st.floats(1e-4, 0.1),
    per_token=st.floats(1e-6, 1e-3),
    per_pair=st.floats(0, 1e-7),
    least=st.integers(1, 600),
    most=st.integers(700, 4096),
    granularity=st.sampled_from([1, 16, 64]),
)
def test_the_budget_is_the_smallest_that_saturates(
    base: float, per_token: float, per_pair: float, least: int, most: int, granularity: int
) -> None:
    step_time = LinearStepTime(base, per_token, per_pair, 0.0)
    budget = saturating_budget(step_time, prompt_len=512, least=least, most=most, granularity=granularity)
    assert least <= budget <= most
    assert budget % granularity == 0
    rate = prompt_rate(step_time, 512)
    best = max(rate(tokens) for tokens in range(-(-least // granularity) * granularity, most + 1, granularity))
    assert rate(budget) >= SATURATED * best
    if budget - granularity >= least:
        assert rate(budget - granularity) < SATURATED * best


def test_slower_computing_lowers_the_budget_and_slower_memory_raises_it() -> None:
    step_time = LinearStepTime(0.01, 5e-5, 0.0, 0.0)

    def budget(of: LinearStepTime) -> int:
        return saturating_budget(of, prompt_len=512, least=16, most=8192)

    assert budget(replace(step_time, per_token=1e-4)) < budget(step_time) < budget(replace(step_time, base=0.02))


def test_a_range_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 600 and at most the 512"):
        saturating_budget(Roofline(0.01, 1e-4), prompt_len=512, least=600, most=512)
