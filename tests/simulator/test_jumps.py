"""Jumping over steps that nothing can change leaves every timeline as it is, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import ClusterModel, InstanceModel, KvGeometry
from simulator.results import Simulation
from simulator.simulation import Fault, FaultKind, simulate

STEP_TIME = LinearStepTime(base=0.01, per_token=0.0005, per_pair=1e-7, per_context=1e-6)


def deployment(
    prefill: int, decode: int, mixed: int, num_blocks: int, policy: PrefillPolicy, *, caching: bool = False
) -> ClusterModel:
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.MIXED] * mixed
    scheduler = SchedulerConfig(
        max_batch_tokens=32, max_batch_size=6, headroom=0.0, prefix_caching=caching, policy=policy
    )
    instances = tuple(
        InstanceModel(
            InstanceSpec(f"{role}-{index}", role, KvConfig(num_blocks, 4), scheduler),
            STEP_TIME,
            (Gpu(0, index),),
        )
        for index, role in enumerate(roles)
    )
    # A token takes 0.4 ms of a link that two flows halve: pulls overlap with the steps that make their layers.
    cluster = ClusterSpec("cpu", 1, len(roles), intra_node_bandwidth=1e6, inter_node_bandwidth=1e6)
    return ClusterModel(instances, cluster, KvGeometry(num_layers=2, num_kv_heads=2, token_bytes=100))


def offered(requests: list[tuple[int, int, float]], kinds: list[int] | None = None) -> Workload:
    """Prompts of one kind are alike from the first token on."""
    prompts, outputs, gaps = zip(*requests, strict=True)
    blocks = kinds and tuple(
        tuple(range(100 * kind, 100 * kind + -(-prompt // 8))) for kind, prompt in zip(kinds, prompts, strict=False)
    )
    return Workload(
        np.array(prompts), np.array(outputs), np.cumsum(gaps), prefix_blocks=blocks or None, tokens_per_block=8
    )


def same(one: Simulation, other: Simulation) -> None:
    for name in one.timelines.__dataclass_fields__:
        left, right = getattr(one.timelines, name), getattr(other.timelines, name)
        assert left.tobytes() == right.tobytes(), name


REQUESTS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.3, exclude_min=True)), min_size=1, max_size=14
)


@settings(max_examples=60)
@given(
    requests=REQUESTS,
    pools=st.sampled_from([(1, 1, 0), (2, 2, 0), (0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2)]),
    num_blocks=st.integers(31, 50),
    policy=st.sampled_from(list(PrefillPolicy)),
    loss=st.none() | st.floats(0.05, 1.5),
    kinds=st.none() | st.lists(st.integers(0, 2), min_size=14, max_size=14),
)
@example(  # lost before its last token, which the prefill instance then computes
    requests=[(1, 27, 0.1875), (1, 27, 0.28125)],
    pools=(1, 0, 2),
    num_blocks=31,
    policy=PrefillPolicy.SPLITFUSE,
    loss=0.74,
    kinds=None,
)
def test_timelines_are_the_same_with_and_without_jumping(
    requests: list[tuple[int, int, float]],
    pools: tuple[int, int, int],
    num_blocks: int,
    policy: PrefillPolicy,
    loss: float | None,
    kinds: list[int] | None,
) -> None:
    """Under preemption, refusals, backpressure and the loss of an instance; with common prefixes and without."""
    model = deployment(*pools, num_blocks, policy, caching=kinds is not None)
    victim = model.instances[-1].spec.instance_id
    faults = [Fault(loss, FaultKind.LOSS, victim)] if loss is not None and max(pools) > 1 else []
    jumping, stepping = (
        simulate(model, offered(requests, kinds), faults=faults, jump=jump, until=60.0) for jump in (True, False)
    )
    same(jumping, stepping)
    assert (jumping.timelines.status == 200).all()
    for one, other in zip(jumping.instances, stepping.instances, strict=True):
        assert one.num_preempted == other.num_preempted
        assert one.peak_kv_blocks == other.peak_kv_blocks
        if not faults:
            assert (one.num_steps, one.num_sequences) == (other.num_steps, other.num_sequences)
            assert one.num_hit_tokens == other.num_hit_tokens
            assert one.busy == pytest.approx(other.busy)


@pytest.mark.parametrize("pools", [(1, 1, 0), (0, 0, 1)])
def test_what_prompts_have_in_common_is_computed_once(pools: tuple[int, int, int]) -> None:
    model = deployment(*pools, 600, PrefillPolicy.SPLITFUSE, caching=True)
    requests = [(40, 5, 0.1), (40, 5, 1.0), (25, 5, 1.0), (25, 5, 1.0)]
    simulation = simulate(model, offered(requests, [0, 0, 0, 1]))
    first = simulation.instances[0]
    # All but the last token's block of 4; and whole blocks only.
    assert first.num_hit_tokens == 36 + 24
    num_decoded = 4 * 4 if pools[2] else 0
    assert first.num_tokens == 40 + 4 + 1 + 25 + num_decoded
    ttft = simulation.timelines.ttft
    assert ttft[1] < ttft[0]
    assert ttft[2] < ttft[3]


def test_common_prefixes_need_one_block_size() -> None:
    one, other = (deployment(0, 0, 1, 600, PrefillPolicy.SPLITFUSE, caching=True).instances[0] for _ in range(2))
    other = replace(other, spec=replace(other.spec, instance_id="other", kv=KvConfig(600, 8)))
    with pytest.raises(ConfigError, match="one block size"):
        simulate(ClusterModel((one, other)), offered([(40, 5, 0.1)], [0]))


def test_a_lone_long_output_costs_few_events() -> None:
    model = deployment(1, 1, 0, 600, PrefillPolicy.SPLITFUSE)
    jumping, stepping = (simulate(model, offered([(20, 2000, 0.1)]), jump=jump) for jump in (True, False))
    same(jumping, stepping)
    assert jumping.instances[1].num_steps == stepping.instances[1].num_steps == 1999
    # What is left are the heartbeats of two instances over the 20 seconds and more.
    assert jumping.num_events < 0.1 * stepping.num_events
