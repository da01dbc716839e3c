"""How steps are filled, as a user says it: the policy, the budget, and a profile that the budget follows from."""

from pathlib import Path
from typing import Any

import pytest

from distserve.cluster.config import ServeConfig, load_config
from distserve.cluster.profile_file import read_profile
from distserve.core.budget import SATURATED, prompt_rate
from distserve.core.config import PrefillPolicy, Role
from distserve.core.errors import ConfigError
from distserve.demo import model_dir

PROFILE = Path("benchmarks/fidelity_cpu/results/profile-2-mixed.json").resolve()
"""Of 88M parameters in bfloat16 on one core, up to 512 tokens a step."""


def load(tmp_path: Path, engine: str, **flags: Any) -> ServeConfig:
    file = tmp_path / "serve.yaml"
    file.write_text(f"placement: {{mixed: {{instances: 2}}}}\nengine: {{dtype: bfloat16, {engine}}}\n")
    return load_config(file, flags, model_dir())


def test_the_policy_is_read_from_the_file_and_from_a_flag(tmp_path: Path) -> None:
    assert load(tmp_path, "").engine.mixed_policy is PrefillPolicy.SPLITFUSE
    assert load(tmp_path, "mixed_policy: whole").engine.mixed_policy is PrefillPolicy.WHOLE_PROMPT
    again = load(tmp_path, "mixed_policy: whole", **{"engine.mixed_policy": "splitfuse"})
    assert again.engine.mixed_policy is PrefillPolicy.SPLITFUSE
    with pytest.raises(ConfigError, match=r"line 2: engine\.mixed_policy: 'both' is wrong, must be 'splitfuse' or"):
        load(tmp_path, "mixed_policy: both")


def test_a_role_that_does_not_exist_is_said_with_those_that_do(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("placement: {both: {instances: 2}}")
    with pytest.raises(ConfigError, match=r"line 1: placement\.both is unknown; known here: decode, mixed, prefill"):
        load_config(file, {}, model_dir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"engine.max_batch_tokens": 15},
            "prefill instance: .* 15 is smaller than a KV block",
        ),
        (
            {"engine.max_batch_tokens": 48, "placement.mixed.instances": 1},
            "mixed instance: .* 48 has no room",
        ),
        ({"engine.max_batch_size": 513, "placement.mixed.instances": 1}, "max_batch_tokens to 513 or more"),
    ],
)
def test_a_step_too_small_is_refused_before_anything_starts(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, flags, model_dir())
    load_config(None, flags | {"engine.max_batch_tokens": 600}, model_dir())


def test_a_policy_of_mixed_instances_needs_some() -> None:
    with pytest.raises(ConfigError, match="for mixed instances, and there are none: give --mixed 1"):
        load_config(None, {"engine.mixed_policy": "whole"}, model_dir())


def test_a_plan_that_has_no_mixed_instances_may_have_had_a_policy_for_them(tmp_path: Path) -> None:
    """It was one of those that the planner chose among."""
    (tmp_path / "plan.yaml").write_text(
        "placement: {prefill: {instances: 1}, decode: {instances: 1}}\n"
        "engine: {mixed_policy: whole}\nprediction: {rate: 1.0}\n"
    )
    config = load_config(tmp_path / "plan.yaml", {}, model_dir())
    assert {instance.role for instance in config.instances} == {Role.PREFILL, Role.DECODE}


def test_the_budget_is_where_the_profiles_throughput_saturates(tmp_path: Path) -> None:
    profile = read_profile(PROFILE)
    chosen = load(tmp_path, f"profile: {PROFILE}").engine.max_batch_tokens
    rate = prompt_rate(profile.step_time(), 512)
    best = max(rate(tokens) for tokens in range(64, 513, 16))
    assert 64 <= chosen <= 512
    assert rate(chosen) >= SATURATED * best
    assert chosen == 64 or rate(chosen - 16) < SATURATED * best


def test_a_budget_that_is_set_wins_over_a_profile(tmp_path: Path) -> None:
    assert load(tmp_path, f"profile: {PROFILE}, max_batch_tokens: 384").engine.max_batch_tokens == 384
    assert load(tmp_path, "").engine.max_batch_tokens == 512


def test_a_profile_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_bytes(PROFILE.read_bytes())
    assert load(tmp_path, "profile: here.json").engine == load(tmp_path, f"profile: {PROFILE}").engine


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("profile: nowhere.json", "cannot read .*nowhere.json"),
        (f"profile: {PROFILE}, dtype: float32", "is a profile in bfloat16, to be served is float32"),
        (f"profile: {PROFILE}, max_batch_size: 600", "at least 600 and at most the 512 tokens that were measured"),
    ],
)
def test_a_profile_that_does_not_do_says_why(tmp_path: Path, engine: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    lines = "".join(f"  {line}\n" for line in ["dtype: bfloat16"] * ("dtype" not in engine) + engine.split(", "))
    file.write_text(f"placement: {{mixed: {{instances: 2}}}}\nengine:\n{lines}")
    with pytest.raises(ConfigError, match=message):
        load_config(file, {}, model_dir())
