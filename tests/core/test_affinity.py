"""Decode instances near a prefill instance: what a placement says, and what the router makes of it."""

from distserve.core.commands import Send
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.events import InstanceUp, Received
from distserve.core.messages import DecodeAssigned, DecodeWanted, Report
from distserve.core.router import Router, RouterConfig
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement


def placed(name: str, role: Role, pp: int, seats: list[tuple[int, int]]) -> PlacedInstance:
    spec = InstanceSpec(name, role, KvConfig(100), parallel=ParallelConfig(len(seats) // pp, pp))
    return PlacedInstance(spec, tuple(Gpu(node, index) for node, index in seats))


def test_instances_are_near_when_every_common_layer_is_on_one_node():
    placement = Placement(
        ClusterSpec("a100-80g-sxm", 2, 4, 300e9, 3e9),
        (
            placed("p-split", Role.PREFILL, 2, [(0, 0), (1, 0)]),
            placed("p-whole", Role.PREFILL, 1, [(0, 1)]),
            placed("d-split", Role.DECODE, 2, [(0, 2), (1, 2)]),
            placed("d-crossed", Role.DECODE, 2, [(1, 1), (0, 3)]),
            placed("d-here", Role.DECODE, 2, [(0, 1), (0, 0)]),
        ),
    )
    assert placement.near() == {"p-split": ("d-split",), "p-whole": ("d-here",)}


def test_three_stages_against_two_share_the_middle_one():
    seats = [(0, 0), (0, 1), (1, 1)]
    placement = Placement(
        ClusterSpec("a100-80g-sxm", 2, 4, 300e9, 3e9),
        (placed("p", Role.PREFILL, 3, seats), placed("d", Role.DECODE, 2, [(0, 2), (1, 2)])),
    )
    assert placement.near() == {"p": ()}


def assignments(near: dict[str, tuple[str, ...]], free: dict[str, int]) -> list[str]:
    router = Router(RouterConfig(near=near))
    for name in free:
        router.handle(0.0, InstanceUp(InstanceSpec(name, Role.DECODE, KvConfig(100))))
    for name, blocks in free.items():
        router.handle(0.0, Received(name, Report(name, 0, 0, 1, blocks)))
    commands = router.handle(0.1, Received("p0", DecodeWanted(("r", 0), "owner", 16, 1, 16, ())))
    return [c.message.decode_id for c in commands if isinstance(c, Send) and isinstance(c.message, DecodeAssigned)]


def test_a_near_instance_comes_first_though_another_is_a_little_emptier():
    assert assignments({}, {"d0": 80, "d1": 90}) == ["d1"]
    assert assignments({"p0": ("d0",)}, {"d0": 80, "d1": 90}) == ["d0"]


def test_loads_stay_even():
    assert assignments({"p0": ("d0",)}, {"d0": 50, "d1": 90}) == ["d1"]


def test_a_full_near_instance_is_passed_over():
    assert assignments({"p0": ("d0",)}, {"d0": 3, "d1": 9}) == ["d1"]
