"""Changes of role in a simulated run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Lognormal
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import ClusterModel, InstanceModel, KvGeometry
from simulator.simulation import Fault, FaultKind, simulate

STEP_TIME = LinearStepTime(base=0.01, per_token=0.0001, per_pair=1e-8, per_context=1e-7)


def deployment(num_blocks: int = 500, **pools: int) -> ClusterModel:
    names = [(f"{role}-{index}", Role(role)) for role, count in pools.items() for index in range(count)]
    scheduler = SchedulerConfig(max_model_len=9000)
    instances = tuple(
        InstanceModel(InstanceSpec(name, role, KvConfig(num_blocks, 16), scheduler), STEP_TIME, (Gpu(0, at),))
        for at, (name, role) in enumerate(names)
    )
    cluster = ClusterSpec("cpu", 1, len(names), intra_node_bandwidth=1e9, inter_node_bandwidth=1e9)
    return ClusterModel(instances, cluster, KvGeometry(num_layers=2, num_kv_heads=2, token_bytes=100))


def poisson(rate: float, num: int, seed: int = 0) -> Workload:
    lengths = Lognormal(200, 0.8, 1000), Lognormal(60, 0.8, 300)
    return WorkloadSpec(Gamma(), *lengths, num_requests=num, seed=seed).at(rate)


def test_an_instance_is_used_in_its_new_role_from_then_on() -> None:
    model = deployment(prefill=2, decode=2)
    result = simulate(model, poisson(15, 300), faults=[Fault(5.0, FaultKind.PREFILL, "decode-1")])
    times = result.timelines
    assert (times.status == 200).all()
    assert (times.num_attempts == 1).all()
    assert (times.decode_id[times.arrival < 4.0] == 3).any()
    assert not (times.decode_id[times.arrival > 5.1] == 3).any()
    assert not (times.prefill_id[times.arrival < 5.0] == 3).any()
    assert (times.prefill_id == 3).any()
    assert [usage.role for usage in result.instances][3] is Role.PREFILL


def test_a_change_relieves_the_pool_that_is_short() -> None:
    """Long prompts: one prefill instance of four is too few, three are enough."""
    offered = WorkloadSpec(Gamma(), Lognormal(600, 0.3, 1000), Lognormal(20, 0.3, 60), num_requests=600, seed=1).at(20)
    model = deployment(prefill=1, decode=3)
    short = simulate(model, offered)
    faults = [Fault(3.0, FaultKind.PREFILL, "decode-1"), Fault(6.0, FaultKind.PREFILL, "decode-2")]
    relieved = simulate(model, offered, faults=faults)
    assert (relieved.timelines.status == 200).all()
    late = offered.arrivals > 15.0 if offered.arrivals is not None else np.empty(0, dtype=bool)
    assert np.median(relieved.timelines.ttft[late]) < 0.5 * np.median(short.timelines.ttft[late])


@pytest.mark.parametrize(
    ("pools", "faults", "words"),
    [
        ({"prefill": 1, "decode": 1}, [Fault(1.0, FaultKind.DECODE, "prefill-0")], "last prefill"),
        ({"prefill": 2, "decode": 1}, [Fault(1.0, FaultKind.PREFILL, "prefill-0")], "already"),
        (
            {"prefill": 2, "decode": 1},
            [Fault(0.5, FaultKind.LOSS, "prefill-1"), Fault(4.0, FaultKind.DECODE, "prefill-1")],
            "no instance is called prefill-1",
        ),
    ],
)
def test_a_change_that_cannot_be_is_said(pools: dict[str, int], faults: list[Fault], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(deployment(**pools), poisson(5, 60), faults=faults)


REQUESTS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.3, exclude_min=True)), min_size=1, max_size=14
)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    # With who can be spared, each in turn.
    pools=st.sampled_from(
        [((2, 2, 0), ("prefill-0", "decode-0")), ((1, 1, 1), ("mixed-0",)), ((0, 0, 2), ("mixed-1",))]
    ),
    changes=st.lists(st.tuples(st.floats(0.0, 2.0), st.sampled_from(["prefill", "decode", "mixed"])), max_size=2),
)
def test_every_request_is_answered_and_jumps_change_nothing(
    requests: list[tuple[int, int, float]],
    pools: tuple[tuple[int, int, int], tuple[str, ...]],
    changes: list[tuple[float, str]],
) -> None:
    counts, spared = pools
    model = deployment(60, **dict(zip(("prefill", "decode", "mixed"), counts, strict=True)))
    prompts, outputs, gaps = zip(*requests, strict=True)
    offered = Workload(np.array(prompts), np.array(outputs), np.cumsum(gaps))
    faults = [
        Fault(time, FaultKind(kind), name)
        for name, (time, kind) in zip(spared, changes, strict=False)
        if not name.startswith(kind)
    ]
    jumping, stepping = (simulate(model, offered, faults=faults, jump=jump) for jump in (True, False))
    assert (jumping.timelines.status == 200).all()
    for name in jumping.timelines.__dataclass_fields__:
        assert getattr(jumping.timelines, name).tobytes() == getattr(stepping.timelines, name).tobytes(), name
