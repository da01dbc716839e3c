"""Where ranks go: what was planned together stays together, and a cluster that falls short is told what it lacks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.cluster.seats import (
    FoundNode,
    PlannedLimits,
    WantedInstance,
    check_kv_said,
    check_kv_transport,
    check_seats,
    group_by_node,
    match_nodes,
)
from distserve.cluster.sizing import KvRequest
from distserve.core.config import ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec, Gpu

A100 = ClusterSpec("a100-80g-sxm", 4, 8, 600e9, 25e9 / 8)
CPUS = ClusterSpec("cpu", 1, 2, 10e9, 1e9)


def instance(role: Role, tp: int, pp: int, *seats: tuple[int, int]) -> WantedInstance:
    return WantedInstance(role, ParallelConfig(tp, pp), tuple(Gpu(*seat) for seat in seats))


def boxes(num: int, num_gpus: int, *types: str) -> list[FoundNode]:
    return [FoundNode(f"box-{i}", 64, num_gpus, frozenset(types)) for i in range(num)]


@st.composite
def plans(draw: st.DrawFn) -> tuple[ClusterSpec, list[WantedInstance]]:
    """Instances of any shape packed into a cluster, each stage within one node."""
    gpus_per_node = draw(st.integers(1, 8))
    num_nodes = draw(st.integers(1, 5))
    free = {node: list(range(gpus_per_node)) for node in range(num_nodes)}
    instances = []
    for _ in range(draw(st.integers(1, 8))):
        tp, pp = draw(st.integers(1, gpus_per_node)), draw(st.integers(1, 3))
        gpus: list[Gpu] = []
        for _ in range(pp):
            node = draw(st.sampled_from(sorted(free)))
            if len(free[node]) < tp:
                break
            gpus += [Gpu(node, free[node].pop()) for _ in range(tp)]
        if len(gpus) == tp * pp:
            instances.append(WantedInstance(draw(st.sampled_from(Role)), ParallelConfig(tp, pp), tuple(gpus)))
    if not instances:
        instances = [WantedInstance(Role.MIXED, ParallelConfig(), (Gpu(0, 0),))]
    return ClusterSpec("h100-sxm", num_nodes, gpus_per_node, 1.0, 1.0), instances


@given(plans())
def test_every_rank_has_one_seat_and_shares_a_node_exactly_as_planned(
    plan: tuple[ClusterSpec, list[WantedInstance]],
) -> None:
    cluster, instances = plan
    check_seats(instances, cluster)
    groups = group_by_node(instances)
    seats = [seat for group in groups for seat in group.seats]
    assert sorted(seats) == [(i, r) for i, one in enumerate(instances) for r in range(one.parallel.num_ranks)]
    for group in groups:
        assert {instances[i].gpus[rank].node for i, rank in group.seats} == {group.node}
    assert len({group.node for group in groups}) == len(groups)


@given(plans(), st.lists(st.integers(0, 8), max_size=6))
def test_a_mapping_is_found_exactly_when_there_is_one(
    plan: tuple[ClusterSpec, list[WantedInstance]], sizes: list[int]
) -> None:
    cluster, instances = plan
    groups = group_by_node(instances)
    found = [FoundNode(str(i), 4, size) for i, size in enumerate(sizes)]
    needs = {group.node: len(group.seats) for group in groups}
    # Hall's condition for intervals: for every size, enough nodes of at least it.
    possible = all(
        sum(size >= need for size in sizes) >= sum(other >= need for other in needs.values()) for need in needs.values()
    )
    if possible:
        mapping = match_nodes(groups, cluster, found)
        assert set(mapping) == set(needs)
        assert len({node.node_id for node in mapping.values()}) == len(needs)
        assert all(mapping[node].num_gpus >= need for node, need in needs.items() if node is not None)
    else:
        with pytest.raises(ConfigError, match="the plan needs"):
            match_nodes(groups, cluster, found)


def test_what_is_missing_is_said_in_numbers() -> None:
    full = [instance(Role.PREFILL, 8, 1, *((node, i) for i in range(8))) for node in range(4)]
    with pytest.raises(ConfigError) as error:
        match_nodes(group_by_node(full), A100, [FoundNode("head", 2)])
    assert "the plan needs 4 nodes of 8 a100-80g-sxm GPUs, the cluster has 1 node of 2 CPUs (no GPU)" in str(
        error.value
    )
    with pytest.raises(
        ConfigError, match="the cluster has 3 nodes of 8 GPUs and 64 CPUs, 1 node of 4 GPUs and 64 CPUs"
    ):
        match_nodes(group_by_node(full), A100, [*boxes(3, 8), *boxes(1, 4)])
    two = [instance(Role.PREFILL, 1, 1, (0, 0)), instance(Role.DECODE, 1, 1, (0, 1))]
    with pytest.raises(ConfigError, match="needs 1 node of 2 CPUs, the cluster has 1 node of 1 CPU"):
        match_nodes(group_by_node(two), CPUS, [FoundNode("head", 1)])
    with pytest.raises(ConfigError, match="the cluster has no node"):
        match_nodes(group_by_node(two), CPUS, [])


def test_other_gpus_than_planned_do_not_count() -> None:
    one = group_by_node([instance(Role.MIXED, 8, 1, *((0, i) for i in range(8)))])
    with pytest.raises(ConfigError, match="4 nodes of 8 H100 GPUs"):
        match_nodes(one, A100, boxes(4, 8, "H100"))
    # Ray calls an A100 by its memory, or not.
    assert match_nodes(one, A100, boxes(1, 8, "A100-80G"))[0].node_id == "box-0"
    assert match_nodes(one, A100, boxes(1, 8, "A100"))[0].node_id == "box-0"


def test_the_fullest_node_of_the_plan_goes_to_the_largest_there_is() -> None:
    instances = [instance(Role.PREFILL, 1, 1, (2, 0)), instance(Role.DECODE, 4, 1, *((0, i) for i in range(4)))]
    found = [FoundNode("small", 8, 2), FoundNode("large", 8, 8)]
    mapping = match_nodes(group_by_node(instances), A100, found)
    assert {node: there.node_id for node, there in mapping.items()} == {0: "large", 2: "small"}


def test_unplanned_instances_share_one_node() -> None:
    (group,) = group_by_node([instance(Role.PREFILL, 2, 1), instance(Role.DECODE, 1, 1)])
    assert group.node is None
    assert group.seats == ((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([instance(Role.PREFILL, 2, 1, (0, 0))], "has 2 ranks .* and 1 GPUs"),
        ([instance(Role.PREFILL, 1, 1, (4, 0))], "no GPU 0 on a node 4"),
        ([instance(Role.PREFILL, 1, 1, (0, 8))], "no GPU 8 on a node 0"),
        ([instance(Role.PREFILL, 1, 1, (0, 0)), instance(Role.DECODE, 1, 1, (0, 0))], "given to 2 ranks"),
        ([instance(Role.DECODE, 2, 1, (0, 0), (1, 0))], "spans the nodes 0, 1"),
    ],
)
def test_a_damaged_placement_is_refused(instances: list[WantedInstance], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_seats(instances, A100)


def test_how_much_kv_an_instance_has_of_its_gpu_is_said_or_asked_for() -> None:
    prefill = replace(instance(Role.PREFILL, 1, 1, (0, 0)), limits=PlannedLimits(kv_tokens=4096))
    decode = instance(Role.DECODE, 1, 1, (1, 0))
    check_kv_said([prefill], A100, KvRequest())
    check_kv_said([prefill, decode], A100, KvRequest(num_bytes=2**30))
    check_kv_said([decode], CPUS, KvRequest())
    with pytest.raises(ConfigError, match=r"a decode instance .* Give placement\.decode\.kv_tokens"):
        check_kv_said([prefill, decode], A100, KvRequest())


def test_shared_memory_ends_at_a_node() -> None:
    near = [instance(Role.PREFILL, 1, 1, (0, 0)), instance(Role.DECODE, 1, 1, (0, 1))]
    apart = [near[0], instance(Role.DECODE, 1, 1, (1, 0)), instance(Role.MIXED, 1, 1, (2, 0))]
    where = "decode on node 1, mixed on node 2, prefill on node 0"
    with pytest.raises(ConfigError, match=rf"{where}, .* give --kv-transport auto"):
        check_kv_transport(apart, CPUS, "shm")
    check_kv_transport(apart, CPUS, "auto")
    check_kv_transport(apart, CPUS, "tcp")
    check_kv_transport(near, CPUS, "shm")
    with pytest.raises(ConfigError, match="mixed on node 0, mixed on node 1, prefill on node 0"):
        check_kv_transport([near[0], instance(Role.MIXED, 1, 2, (0, 1), (1, 0))], CPUS, "shm")
    # Where nothing was planned all share a node; mixed instances exchange nothing.
    check_kv_transport([instance(Role.PREFILL, 1, 1), instance(Role.DECODE, 2, 1)], None, "shm")
    check_kv_transport([instance(Role.MIXED, 1, 1, (0, 0)), instance(Role.MIXED, 1, 1, (1, 0))], CPUS, "shm")


def test_nccl_is_for_gpus_and_shared_memory_for_cpus() -> None:
    pair = [instance(Role.PREFILL, 1, 1, (0, 0)), instance(Role.DECODE, 1, 1, (1, 0))]
    for transport in ("auto", "nccl", "tcp"):
        check_kv_transport(pair, A100, transport)
    for cluster in (CPUS, None):
        with pytest.raises(ConfigError, match="between GPUs, and the instances compute on CPUs: give auto"):
            check_kv_transport(pair, cluster, "nccl")
    with pytest.raises(ConfigError, match=r"shm is for KV in host memory, .* give auto, nccl or tcp"):
        check_kv_transport(pair, A100, "shm")


def test_a_node_with_gpus_of_several_types_is_not_used() -> None:
    """Which of them a shard gets is Ray's choice, and those of a stage have to be alike."""
    groups = group_by_node([instance(Role.MIXED, 2, 1, (0, 0), (0, 1))])
    with pytest.raises(ConfigError, match="1 node of 8 A100/H100 GPUs"):
        match_nodes(groups, A100, boxes(1, 8, "A100", "H100"))
    assert match_nodes(groups, A100, boxes(1, 8, "A100"))
