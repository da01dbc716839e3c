"""Seats: nobody shares a GPU, shards share a node, stages side by side keep KV within nodes."""

from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.topology import ClusterSpec, PlacedInstance, Placement
from placement.layout import Seat, lay_out

shapes = st.builds(ParallelConfig, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4]))


def place(cluster: ClusterSpec, seats: list[Seat]) -> Placement | None:
    seated = lay_out(cluster, seats)
    if seated is None:
        return None
    return Placement(
        cluster,
        tuple(
            PlacedInstance(InstanceSpec(f"{role}-{number}", role, KvConfig(10), parallel=seat.parallel), gpus)
            for role, seat, pool in zip((Role.PREFILL, Role.DECODE), seats, seated, strict=False)
            for number, gpus in enumerate(pool)
        ),
    )


def fewest_nodes(parallel: ParallelConfig, gpus_per_node: int) -> int:
    return -(-parallel.pp // (gpus_per_node // parallel.tp))


@given(shapes, shapes, st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_a_seated_placement_is_sound(prefill, decode, num_prefill, num_decode, num_nodes):
    cluster = ClusterSpec("a100-80g-sxm", num_nodes, 8, 300e9, 3e9)
    seats = [
        Seat(prefill, num_prefill, fewest_nodes(prefill, 8)),
        Seat(decode, num_decode, fewest_nodes(decode, 8)),
    ]
    placement = place(cluster, seats)
    if placement is None:
        return
    placement.check()
    for instance, seat in zip(placement.instances, [seats[0]] * num_prefill + [seats[1]] * num_decode, strict=True):
        stages = [{gpu.node for gpu in instance.stage(stage)} for stage in range(instance.spec.parallel.pp)]
        assert all(len(nodes) == 1 for nodes in stages)
        assert len(set.union(*stages)) == seat.span


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 4]), st.integers(1, 3))
def test_stages_side_by_side_leave_no_kv_to_the_network(prefill_tp, decode_tp, pp, num_units):
    if prefill_tp + decode_tp > 8:
        return
    cluster = ClusterSpec("a100-80g-sxm", pp * num_units, 8, 300e9, 3e9)
    seats = [
        Seat(ParallelConfig(prefill_tp, pp), num_units, pp),
        Seat(ParallelConfig(decode_tp, pp), num_units, pp),
    ]
    placement = place(cluster, seats)
    assert placement is not None
    assert all(near for near in placement.near().values())


def test_each_node_gets_both_phases():
    cluster = ClusterSpec("a100-80g-sxm", 2, 8, 300e9, 3e9)
    placement = place(cluster, [Seat(ParallelConfig(4), 2, 1), Seat(ParallelConfig(4), 2, 1)])
    assert placement is not None
    assert [len(near) for near in placement.near().values()] == [1, 1]


def test_no_more_nodes_than_needed():
    cluster = ClusterSpec("a100-80g-sxm", 4, 8, 300e9, 3e9)
    placement = place(cluster, [Seat(ParallelConfig(2), 3, 1), Seat(ParallelConfig(1), 2, 1)])
    assert placement is not None
    assert placement.num_nodes == 1


def test_what_has_no_room_is_not_seated():
    cluster = ClusterSpec("a100-80g-sxm", 1, 8, 300e9, 3e9)
    assert lay_out(cluster, [Seat(ParallelConfig(4), 2, 1), Seat(ParallelConfig(1), 1, 1)]) is None


def test_instances_over_different_numbers_of_nodes_are_seated_beside_each_other():
    cluster = ClusterSpec("a100-80g-sxm", 5, 8, 300e9, 3e9)
    placement = place(cluster, [Seat(ParallelConfig(8, 2), 1, 2), Seat(ParallelConfig(8, 3), 1, 3)])
    assert placement is not None
    placement.check()
    assert [len({gpu.node for gpu in instance.gpus}) for instance in placement.instances] == [2, 3]


def test_what_cannot_be_spread_fills_one_node_after_the_other():
    # Spread, each node has a pipeline of three and room for two pairs: one GPU is left on each, and a pair too many.
    cluster = ClusterSpec("a100-80g-sxm", 2, 8, 300e9, 3e9)
    placement = place(cluster, [Seat(ParallelConfig(1, 3), 2, 1), Seat(ParallelConfig(2), 5, 1)])
    assert placement is not None
    placement.check()
    assert placement.num_gpus == cluster.num_gpus
