import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.network import Network, Route

CLOSE = 1e-9


def water_fill(capacities: Sequence[float], routes: Mapping[int, Route]) -> dict[int, float]:
    """Max-min rates by raising all flows together until a link is full, over and over."""
    rates = dict.fromkeys(routes, 0.0)
    rising = set(routes)
    while rising:
        room = {}
        for link, capacity in enumerate(capacities):
            num = sum(link in routes[flow] for flow in rising)
            if num:
                used = sum(rate for flow, rate in rates.items() if link in routes[flow])
                room[link] = (capacity - used) / num
        step = min(room.values())
        for flow in rising:
            rates[flow] += step
        full = {link for link, left in room.items() if left <= step * (1 + CLOSE)}
        rising = {flow for flow in rising if not full.intersection(routes[flow])}
    return rates


@dataclass
class Fluid:
    """The same network by brute force: all rates anew at every event."""

    capacities: Sequence[float]
    routes: dict[int, Route] = field(default_factory=dict)
    left: dict[int, float] = field(default_factory=dict)
    now: float = 0.0
    carried: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.carried = [0.0] * len(self.capacities)

    def next(self) -> tuple[float, int] | None:
        rates = water_fill(self.capacities, self.routes)
        return min(((self.now + self.left[flow] / rates[flow], flow) for flow in self.routes), default=None)

    def advance(self, now: float) -> None:
        for flow, rate in water_fill(self.capacities, self.routes).items():
            moved = min(rate * (now - self.now), self.left[flow])
            self.left[flow] -= moved
            for link in self.routes[flow]:
                self.carried[link] += moved
        self.now = now


capacities_of_links = st.lists(st.sampled_from([1.0, 2.0, 3.0, 7.0, 10.0]), min_size=1, max_size=5)


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[float], list[Route]]:
    capacities = draw(capacities_of_links)
    route = st.lists(st.integers(0, len(capacities) - 1), min_size=1, max_size=3, unique=True).map(tuple)
    return capacities, draw(st.lists(route, min_size=1, max_size=9))


def run_out(net: Network) -> Iterator[tuple[float, int]]:
    while (completion := net.next_completion()) is not None:
        assert completion[0] == net.next_time
        net.finish(*completion)
        yield completion
    assert net.next_time == math.inf


@given(networks())
def test_rates_are_those_of_water_filling(network: tuple[list[float], list[Route]]) -> None:
    capacities, routes = network
    net = Network(capacities)
    flows = {net.start(0.0, route, 100.0): route for route in routes}
    for flow, rate in water_fill(capacities, flows).items():
        assert net.rate(flow) == pytest.approx(rate, rel=CLOSE)


@settings(max_examples=200)
@given(networks(), st.randoms(use_true_random=False))
def test_a_history_of_starts_ends_and_cancellations_is_that_of_brute_force(
    network: tuple[list[float], list[Route]], rng: random.Random
) -> None:
    capacities, routes = network
    net, fluid = Network(capacities), Fluid(capacities)
    waiting = sorted((rng.choice([0.0, 1.0, rng.random() * 10]), i) for i in range(len(routes)))
    while waiting or fluid.routes:
        expected, completion = fluid.next(), net.next_completion()
        assert (expected is None) == (completion is None)
        if expected is not None and completion is not None:
            assert completion[0] == pytest.approx(expected[0], rel=CLOSE)
        if waiting and (completion is None or waiting[0][0] < completion[0]):
            time, i = waiting.pop(0)
            fluid.advance(time)
            num_bytes = rng.choice([5.0, rng.random() * 20])
            flow = net.start(time, routes[i], num_bytes)
            fluid.routes[flow], fluid.left[flow] = routes[i], num_bytes
        elif fluid.routes and rng.random() < 0.2:
            time = fluid.now + rng.random() * (completion[0] - fluid.now) if completion else fluid.now
            fluid.advance(time)
            flow = rng.choice(sorted(fluid.routes))
            del fluid.routes[flow]
            assert net.cancel(time, flow) == pytest.approx(fluid.left.pop(flow), rel=1e-6, abs=1e-6)
        else:
            assert completion is not None
            time, flow = completion
            fluid.advance(time)
            assert fluid.left[flow] == pytest.approx(0.0, abs=1e-6)
            del fluid.routes[flow], fluid.left[flow]
            net.finish(time, flow)
        assert net.link_bytes(time) == pytest.approx(fluid.carried, rel=1e-6, abs=1e-6)
        for carried, busy, capacity in zip(net.link_bytes(time), net.busy_seconds(time), capacities, strict=True):
            assert carried <= capacity * busy * (1 + CLOSE) + CLOSE


def test_what_is_due_later_is_due_as_others_that_end_before_leave_it() -> None:
    net = Network([10.0])
    net.start(0.0, (0,), 10.0)
    longer = net.start(0.0, (0,), 30.0)
    ends = []
    while (completion := net.due(math.inf)) is not None:
        net.finish(*completion)
        ends.append(completion)
    assert ends == [(pytest.approx(2.0), 0), (pytest.approx(4.0), longer)]


@given(networks())
def test_taking_what_is_due_together_ends_every_flow_when_one_by_one_does(
    network: tuple[list[float], list[Route]],
) -> None:
    capacities, routes = network
    together, alone = Network(capacities), Network(capacities)
    for route in routes:
        assert together.start(0.0, route, 10.0) == alone.start(0.0, route, 10.0)
    ends = {}
    while (now := together.next_time) < math.inf:
        assert together.due(now * (1 - CLOSE) - CLOSE) is None
        while (completion := together.due(now)) is not None:
            together.finish(*completion)
            ends[completion[1]] = completion[0]
    assert ends == pytest.approx({flow: time for time, flow in run_out(alone)}, rel=CLOSE)
    assert together.link_bytes(now) == pytest.approx(alone.link_bytes(now), rel=CLOSE)


def test_equal_flows_share_a_link_equally_and_end_in_order_of_their_start() -> None:
    net = Network([10.0])
    flows = [net.start(0.0, (0,), 20.0) for _ in range(5)]
    assert [net.rate(flow) for flow in flows] == [2.0] * 5
    assert list(run_out(net)) == [(10.0, flow) for flow in flows]


def test_a_flow_speeds_up_when_another_ends_and_slows_down_when_one_starts() -> None:
    net = Network([10.0])
    long = net.start(0.0, (0,), 100.0)
    short = net.start(2.0, (0,), 15.0)
    # 20 bytes alone, 15 at half the rate until 5, the other 65 alone.
    assert list(run_out(net)) == [(5.0, short), (11.5, long)]


def test_a_flow_held_up_elsewhere_leaves_its_share_to_others() -> None:
    net = Network([10.0, 2.0])
    held_up = net.start(0.0, (0, 1), 2.0)
    other = net.start(0.0, (0,), 8.0)
    assert (net.rate(held_up), net.rate(other)) == (2.0, 8.0)


def test_flows_that_share_no_link_are_left_alone() -> None:
    net = Network([10.0, 10.0])
    first = net.start(0.0, (0,), 10.0)
    net.start(0.5, (1,), 100.0)
    assert net.next_completion() == (1.0, first)


def test_without_links_or_bytes_a_flow_ends_as_it_starts() -> None:
    net = Network([1.0])
    under_way = net.start(1.0, (0,), 5.0)
    at_once, empty = net.start(2.0, (), 1e9), net.start(2.0, (0,), 0.0)
    assert list(run_out(net)) == [(2.0, at_once), (2.0, empty), (6.0, under_way)]


def test_a_cancelled_flow_gives_its_share_back() -> None:
    net = Network([10.0])
    first, second, third = (net.start(0.0, (0,), 30.0) for _ in range(3))
    instant = net.start(0.0, (), 1.0)
    assert net.cancel(0.0, instant) == 0.0
    assert net.cancel(3.0, first) == pytest.approx(20.0)
    assert net.cancel(5.0, third) == pytest.approx(10.0)
    assert list(run_out(net)) == [(6.0, second)]
    assert net.link_bytes(6.0) == pytest.approx([60.0])
    assert net.busy_seconds(9.0) == [6.0]


def test_a_link_offered_far_more_than_it_carries_throttles_to_its_capacity() -> None:
    net = Network([0.5e9, 100e9])
    for i in range(86):
        net.start(i * 0.01, (0, 1), 0.5e9)  # 43 GB offered within 0.86 s
    *_, (end, _) = run_out(net)
    assert end == pytest.approx(86.0)
    assert net.link_bytes(end)[0] == pytest.approx(43e9)


def test_processor_sharing_has_the_mean_sojourn_of_mg1ps() -> None:
    # M/G/1-PS: E[sojourn of size x] = x / (C (1 - rho)), whatever the distribution of sizes (Kleinrock II, 4.4).
    rng = random.Random(7)
    load, capacity, num = 0.7, 10.0, 40_000
    sizes = [rng.choice([1.0, 1.0, 1.0, 17.0]) for _ in range(num)]  # mean 5, far from exponential
    net = Network([capacity, 4 * capacity])
    arrival = 0.0
    started: dict[int, tuple[float, float]] = {}
    sojourns: dict[float, list[float]] = {1.0: [], 17.0: []}

    def drain(until: float) -> None:
        while (completion := net.next_completion()) is not None and completion[0] <= until:
            net.finish(*completion)
            began, size = started.pop(completion[1])
            sojourns[size].append(completion[0] - began)

    for size in sizes:
        arrival += rng.expovariate(load * capacity / 5.0)
        drain(arrival)
        started[net.start(arrival, (0, 1), size)] = (arrival, size)
    drain(math.inf)
    for size, times in sojourns.items():
        assert sum(times) / len(times) == pytest.approx(size / (capacity * (1 - load)), rel=0.05)
    busy = net.busy_seconds(arrival)
    assert busy[0] / arrival == pytest.approx(load, rel=0.03)
    assert net.link_bytes(arrival)[0] <= capacity * busy[0] * (1 + CLOSE)


def test_the_same_calls_give_the_same_times() -> None:
    def history() -> list[tuple[float, int]]:
        rng = random.Random(3)
        net = Network([rng.random() for _ in range(6)])
        for _ in range(300):
            net.start(0.0, (rng.randrange(3), 3 + rng.randrange(3)), rng.random())
        return list(run_out(net))

    assert history() == history()
