"""The machines together: every request served exactly, nothing left behind, whatever happens on the way."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core.commands import Conclude
from distserve.core.config import KvConfig, PrefillPolicy, SchedulerConfig
from distserve.core.router import RouterConfig
from simulator.model import Delays
from tests.core.any_load import PAIRS, Load, loads, serving
from tests.core.harness import Deployment, expected_tokens, make_request


def test_one_request_is_prefilled_here_and_decoded_there() -> None:
    cluster = Deployment()
    request = make_request("a", prompt=50)
    cluster.submit(request)
    recorder = cluster.run(until=30)
    assert recorder.tokens["a", 0] == expected_tokens(request, 0)
    assert recorder.concluded["a"] == Conclude("a")
    times = [recorder.marks["a"][name] for name in ("prefill_start", "prefill_end", "migration_end", "decode_start")]
    assert times == sorted(times)
    assert recorder.steps("prefill-0")
    assert recorder.steps("decode-0")
    cluster.assert_clean()


def test_migration_starts_before_prefill_ends() -> None:
    cluster = Deployment()
    cluster.submit(make_request("a", prompt=100))
    recorder = cluster.run(until=30)
    marks = recorder.marks["a"]
    assert marks["migration_start"] < marks["prefill_end"]


def test_a_request_that_ends_with_its_first_token_never_reaches_decode() -> None:
    cluster = Deployment()
    cluster.submit(make_request("eos", prompt=10, seed=0))
    cluster.submit(make_request("limit", prompt=10, max_tokens=1))
    recorder = cluster.run(until=30)
    assert recorder.tokens["eos", 0] == [0]
    assert len(recorder.tokens["limit", 0]) == 1
    assert not recorder.steps("decode-0")
    cluster.assert_clean()


def test_choices_are_prefilled_once_and_forked_on_the_decode_side() -> None:
    cluster = Deployment()
    request = make_request("a", prompt=30, n=4, seed=13)
    cluster.submit(request)
    recorder = cluster.run(until=30)
    for choice in range(4):
        assert recorder.tokens["a", choice] == expected_tokens(request, choice)
    assert sum(chunk.num_tokens for step in recorder.steps("prefill-0") for chunk in step.chunks) == 30
    assert any(step.copies for step in recorder.steps("decode-0")), "forks copy a shared block before writing it"
    cluster.assert_clean()


def test_preempted_sequences_come_back_and_end_the_same() -> None:
    small = KvConfig(num_blocks=16, block_size=4)
    cluster = Deployment(decode_kv=small, config=SchedulerConfig(max_batch_tokens=64, max_batch_size=8, headroom=0.0))
    for i in range(4):
        cluster.submit(make_request(f"r{i}", prompt=12, seed=20, max_tokens=20, arrival=0.001 * i))
    cluster.run(until=60)
    assert cluster.schedulers["decode-0"].totals.num_preempted > 0
    cluster.assert_served()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("time", [0.005, 0.03, 0.1, 0.2, 0.3])
def test_losing_an_instance_loses_no_request(victim: str, time: float) -> None:
    cluster = Deployment(prefill=2, decode=2)
    for i in range(8):
        cluster.submit(make_request(f"r{i}", prompt=40, seed=20 + i, n=1 + i % 2))
    cluster.run(until=time)
    cluster.lose(victim)
    cluster.run()
    cluster.assert_served()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_the_only_instance_of_a_role_may_be_replaced_under_load(victim: str) -> None:
    cluster = Deployment()
    for i in range(5):
        cluster.submit(make_request(f"r{i}", prompt=20, seed=20 + i))
    cluster.run(until=0.1)
    spec = cluster.schedulers[victim].spec
    cluster.lose(victim)
    cluster.run(until=10.0)
    cluster.start(replace(spec, instance_id=f"{victim}.1"))
    cluster.run()
    cluster.assert_served()


def test_unservable_requests_are_refused_at_admission() -> None:
    cluster = Deployment(kv=KvConfig(16, 4), config=SchedulerConfig(max_batch_tokens=32, max_batch_size=8))
    cluster.submit(make_request("prompt", prompt=65))
    cluster.submit(make_request("output", prompt=40, max_tokens=30))
    cluster.submit(make_request("choices", prompt=4, n=9))
    cluster.submit(make_request("context", prompt=4, max_tokens=5000))
    cluster.submit(make_request("fits", prompt=40, max_tokens=24))
    recorder = cluster.run(until=30)
    for name in ("prompt", "output", "choices", "context"):
        assert recorder.concluded[name].status == 400
        assert recorder.concluded[name].reason
    assert recorder.concluded["fits"].status == 200
    cluster.assert_clean()


def test_without_a_pool_requests_are_turned_away_for_now() -> None:
    cluster = Deployment(decode=0)
    cluster.submit(make_request("a", prompt=4))
    recorder = cluster.run(until=10)
    assert recorder.concluded["a"].status == 503
    assert "decode" in recorder.concluded["a"].reason


def test_an_overloaded_cluster_sheds_with_a_time_to_come_back() -> None:
    cluster = Deployment(router=RouterConfig(max_wait=1.0))
    for i in range(400):
        cluster.submit(make_request(f"r{i}", prompt=32, arrival=0.002 * i))
    recorder = cluster.run()
    shed = [conclude for conclude in recorder.concluded.values() if conclude.status == 429]
    assert shed
    assert all(conclude.retry_after >= 1 for conclude in shed)
    assert len(recorder.concluded) == 400
    cluster.assert_clean()


def test_work_spreads_over_instances() -> None:
    cluster = Deployment(prefill=3, decode=3)
    for i in range(60):
        cluster.submit(make_request(f"r{i}", prompt=32, seed=20, arrival=0.005 * i))
    recorder = cluster.run()
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        computed = sum(chunk.num_tokens for step in recorder.steps(name) for chunk in step.chunks)
        assert computed == pytest.approx(60 * 32 / 3, rel=0.2)
    for name in ("decode-0", "decode-1", "decode-2"):
        assert recorder.steps(name)


def test_a_slow_link_neither_loses_leases_nor_requests() -> None:
    config = SchedulerConfig(max_batch_tokens=32, max_batch_size=8, lease=0.5)
    cluster = Deployment(config=config, delays=Delays(seconds_per_block=0.3))
    request = make_request("a", prompt=40)
    cluster.submit(request)
    recorder = cluster.run(until=60)
    assert recorder.tokens["a", 0] == expected_tokens(request, 0)
    assert recorder.marks["a"]["migration_end"] - recorder.marks["a"]["migration_start"] > 5 * config.lease
    cluster.assert_clean()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=loads(0.5),
    pools=st.sampled_from([(1, 1, 0), (2, 1, 0), (1, 2, 0), (0, 0, 1), (0, 0, 2)]),
    blocks=st.integers(26, 60),
    in_flight=st.sampled_from([(1, False), (2, False), (2, True), (3, False)]),
    policy=st.sampled_from(PrefillPolicy),
    losses=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 5)), max_size=2),
    pairs=PAIRS,
)
def test_any_workload_is_served_exactly_and_leaves_nothing(
    load: Load,
    pools: tuple[int, int, int],
    blocks: int,
    in_flight: tuple[int, bool],
    policy: PrefillPolicy,
    losses: list[tuple[float, int]],
    pairs: dict[tuple[str, str], float],
) -> None:
    cluster = serving(load, pools, blocks, in_flight, policy=policy, delays=Delays(pairs=pairs))
    cluster.lose_some(losses)
    cluster.run()
    cluster.assert_served()
