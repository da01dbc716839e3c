"""Replicas behind the router: as much load each as one alone, and none idle beside another's queue."""

from benchmarks.mixed_replicas.simulated import (
    even,
    idle_beside_queue,
    latencies,
    replicas,
    round_robin,
    skewed,
)
from simulator.simulation import simulate

RATE = 1.48
"""Requests/s, four fifths of what one replica can just keep up with."""


def test_sixteen_replicas_serve_fifteen_and_a_half_times_the_load_of_one_at_equal_latency() -> None:
    one = latencies(simulate(replicas(1), even(RATE, 1200)).timelines)
    many = latencies(simulate(replicas(16), even(15.5 * RATE, 4800)).timelines)
    assert many.within(one)
    assert not latencies(simulate(replicas(16), even(24 * RATE, 4800)).timelines).within(one), "there is a limit"


def test_with_skewed_lengths_no_replica_idles_while_another_queues() -> None:
    workload = skewed(16.0, 1500)
    assert idle_beside_queue([simulate(replicas(8), workload).timelines], 8) == 0.0
    assert idle_beside_queue(round_robin(workload, 8), 8) > 0.05, "the workload is one that can be balanced badly"
