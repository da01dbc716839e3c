"""A decode instance keeps what it had, pulls only what it lacks, and reads nothing else than without it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.decode import DecodeScheduler
from distserve.core.messages import Abort, Leased, Offer, Preempted, Prefilled, Pulled, Refused, Report, Withdrawn
from distserve.core.request import Request
from simulator.model import Delays
from tests.core.any_load import Load, serving
from tests.core.bench_instance import Bench
from tests.core.harness import Deployment, expected_tokens, make_request

SIZE = 4
SOURCE = 100
"""Block ids at the source, so that none is one of the destination's by chance."""


def bench(blocks: int = 64, *, size: int = 8, caching: bool = True, lookahead: bool = False) -> Bench:
    config = SchedulerConfig(
        max_batch_size=size, max_in_flight=1 + lookahead, lookahead=lookahead, headroom=0.0, prefix_caching=caching
    )
    return Bench(DecodeScheduler(InstanceSpec("decode-0", Role.DECODE, KvConfig(blocks, SIZE), config)))


def request(name: str, tokens: list[int], *, seed: int = 20, n: int = 1, **more: Any) -> Request:
    one = make_request(name, len(tokens), seed=seed, n=n)
    return replace(one, prompt_token_ids=tuple(tokens), **more)


def offer(one: Request, num_ready: int = 0) -> Offer:
    num_tokens = one.num_prefill_tokens
    return Offer(one, range(SOURCE, SOURCE - -num_tokens // SIZE), num_tokens, num_ready, 0)


def first(one: Request) -> Prefilled:
    return Prefilled(one.key, tuple(expected_tokens(one, choice)[0] for choice in one.choices))


def take_in(node: Bench, one: Request, num_ready: int = 0) -> None:
    """Walk it through its hand-off, whether or not there is anything to pull."""
    node.receive(offer(one, num_ready), "prefill-0")
    node.receive(Leased(one.key, 5.0), "prefill-0")
    node.receive(first(one), "prefill-0")
    if node.pulls:
        node.finish_pull()


def run_out(node: Bench) -> None:
    while node.launched:
        node.finish_step()


def output(node: Bench, one: Request, choice: int = 0) -> list[int]:
    return [o.token_id for o in node.outputs() if (o.request_id, o.choice) == (one.request_id, choice)]


def test_only_what_is_missing_is_pulled() -> None:
    node = bench()
    first_turn = request("a", list(range(10)))
    take_in(node, first_turn)
    run_out(node)
    other = request("b", [*range(8), *range(50, 60)])
    node.receive(offer(other, num_ready=12), "prefill-0")
    node.receive(Leased(other.key, 5.0), "prefill-0")
    (pull,) = node.pulls
    assert pull.src_blocks == (SOURCE + 2, SOURCE + 3, SOURCE + 4)
    assert len(pull.dst_blocks) == 3
    assert pull.num_ready_blocks == 1, "of the three that were ready two are here"
    node.finish_pull()
    node.receive(first(other), "prefill-0")
    run_out(node)
    assert output(node, other) == expected_tokens(other, 0)[1:]
    assert node.scheduler.totals.num_hit_tokens == 8
    assert node.scheduler.totals.num_queried_tokens == 10 + 18
    assert node.scheduler.blocks.num_free == 64


def test_the_next_turn_finds_the_answer_too() -> None:
    for lookahead in (False, True):
        node = bench(lookahead=lookahead)
        one = request("a", list(range(12)), seed=11)
        take_in(node, one)
        run_out(node)
        answer = expected_tokens(one, 0)
        turn = request("b", [*range(12), *answer, 7, 8, 9])
        take_in(node, turn)
        # The answer's last token, which would fill a block, was not computed but by a step in flight, which may fail.
        assert (12 + len(answer)) % SIZE == 0
        assert node.scheduler.totals.num_hit_tokens == (12 + len(answer) - 1) // SIZE * SIZE
        run_out(node)
        assert node.scheduler.blocks.num_free == 64


def test_an_answer_that_a_stop_string_ended_is_found() -> None:
    node = bench()
    one = request("a", list(range(8)))
    take_in(node, one)
    for _ in range(5):
        node.finish_step()
    node.receive(Abort(one.key, 0), "api-0")
    run_out(node)
    take_in(node, request("b", [*range(8), *expected_tokens(one, 0)[:4], 1]))
    assert node.scheduler.totals.num_hit_tokens == 12


def test_if_nothing_is_missing_nothing_is_pulled() -> None:
    node = bench()
    take_in(node, request("a", list(range(8))))
    run_out(node)
    again = request("b", list(range(8)))
    node.receive(offer(again), "prefill-0")
    node.receive(Leased(again.key, 5.0), "prefill-0")
    assert not node.pulls
    assert ("prefill-0", Pulled(again.key)) in node.sent
    assert not node.launched, "its first token is still to come"
    node.receive(first(again), "prefill-0")
    run_out(node)
    assert output(node, again) == expected_tokens(again, 0)[1:]
    assert node.scheduler.blocks.num_free == 64


def test_what_others_hold_needs_no_memory() -> None:
    node = bench(blocks=8)
    take_in(node, request("a", list(range(16))))
    node.receive(offer(request("b", list(range(16)))), "prefill-0")
    assert not node.messages(Refused), "4 blocks are shared, 1 is its own"
    node.receive(offer(request("c", list(range(20, 36)))), "prefill-0")
    assert node.messages(Refused) == [Refused(("c", 0))]


def test_what_is_held_and_idle_counts_as_memory_needed() -> None:
    node = bench(blocks=7)
    take_in(node, request("a", list(range(12))))
    run_out(node)
    node.receive(offer(request("other", list(range(30, 42)))), "prefill-0")
    node.receive(offer(request("b", list(range(12)))), "prefill-0")
    assert node.messages(Refused) == [Refused(("b", 0))], "4 and 4 are more than 7"


def test_what_a_pull_left_is_not_found_before_its_source_vouches_for_it() -> None:
    """A step may fail after its layers were passed: then Withdrawn comes, and no first token."""
    for end in (Withdrawn(("a", 0)), Abort(("a", 0))):
        node = bench()
        one = request("a", list(range(8)))
        node.receive(offer(one), "prefill-0")
        node.receive(Leased(one.key, 5.0), "prefill-0")
        node.finish_pull()
        node.receive(end, "prefill-0")
        take_in(node, request("b", list(range(8))))
        assert node.scheduler.totals.num_hit_tokens == 0
        run_out(node)
        assert node.scheduler.blocks.num_free == 64


def test_a_failed_pull_gives_back_what_was_found_as_well() -> None:
    node = bench()
    take_in(node, request("a", list(range(8))))
    run_out(node)
    longer = request("b", list(range(20)))
    node.receive(offer(longer), "prefill-0")
    node.receive(Leased(longer.key, 5.0), "prefill-0")
    node.finish_pull(ok=False)
    assert node.scheduler.blocks.num_free == 64
    node.receive(offer(longer), "prefill-0")
    node.receive(Leased(longer.key, 5.0), "prefill-0")
    assert len(node.pulls[0].src_blocks) == 3, "what was there is there still"


def test_forks_share_what_was_found() -> None:
    node = bench()
    take_in(node, request("a", list(range(10))))
    run_out(node)
    three = request("b", list(range(10)), n=3)
    take_in(node, three)
    assert node.scheduler.totals.num_hit_tokens == 8
    run_out(node)
    for choice in three.choices:
        assert output(node, three, choice) == expected_tokens(three, choice)[1:]
    assert node.scheduler.blocks.num_free == 64
    assert not node.scheduler.blocks.has_shared


def test_a_preempted_sequence_comes_back_to_its_own_blocks() -> None:
    node = bench(blocks=8)
    old, young = request("old", list(range(4))), request("young", list(range(20, 24)))
    young = replace(young, arrival=1.0)
    take_in(node, old)
    take_in(node, young)
    while not node.messages(Preempted):
        node.finish_step()
    run_out(node)
    emitted = [expected_tokens(young, 0)[0], *output(node, young)]
    again = replace(young, attempt=1, output_token_ids=tuple(emitted))
    before = node.scheduler.totals.num_hit_tokens
    node.receive(offer(again), "prefill-0")
    node.receive(Leased(again.key, 5.0), "prefill-0")
    num_pulled = len(node.pulls[0].src_blocks) if node.pulls else 0
    node.receive(Prefilled(again.key, (expected_tokens(young, 0)[len(emitted)],)), "prefill-0")
    if node.pulls:
        node.finish_pull()
    assert num_pulled < 2, "its head, at least, was used last"
    assert node.scheduler.totals.num_hit_tokens > before
    run_out(node)
    assert node.scheduler.blocks.num_free == 8


def test_salts_keep_requests_apart() -> None:
    node = bench()
    take_in(node, request("a", list(range(8)), cache_salt="mine"))
    take_in(node, request("b", list(range(8)), cache_salt="yours"))
    take_in(node, request("c", list(range(8)), cache_salt="mine"))
    assert node.scheduler.totals.num_hit_tokens == 8


def test_reports_name_what_was_found() -> None:
    node = bench()
    for name in "ab":
        take_in(node, request(name, list(range(10))))
        run_out(node)
    node.tick(2.0)
    report = node.messages(Report)[-1]
    assert (report.num_queried_tokens, report.num_hit_tokens) == (20, 8)


# -- whole deployments -------------------------------------------------------------------------------------------------


def with_common_heads(
    drawn: list[tuple[list[tuple[int, int]], int, int, int, float, float | None, bool]],
) -> Load:
    load: Load = []
    for i, (parts, seed, max_tokens, n, arrival, abandoned, scored) in enumerate(drawn):
        tokens = tuple(1000 * kind + place for kind, length in parts for place in range(length))
        one = make_request(f"r{i}", len(tokens), seed=seed, max_tokens=max_tokens, n=n, arrival=arrival)
        sampling = replace(one.sampling, prompt_logprobs=0) if scored and seed % 4 == 0 else one.sampling
        load.append((replace(one, prompt_token_ids=tokens, sampling=sampling), abandoned))
    return load


PARTS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([3, 8, 16, 30])), min_size=1, max_size=3)
LOADS = st.lists(
    st.tuples(
        PARTS,
        st.integers(0, 60),  # seed, which gives the output length
        st.integers(1, 24),  # max_tokens
        st.integers(1, 3),  # n
        st.floats(0, 1.5),  # arrival
        st.one_of(st.none(), st.floats(0, 1.0)),  # abandoned after
        st.booleans(),  # wants its prompt's log-probabilities
    ),
    min_size=1,
    max_size=14,
).map(with_common_heads)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=LOADS,
    pools=st.sampled_from([(1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0), (0, 0, 2), (1, 1, 1)]),
    blocks=st.integers(34, 70),
    in_flight=st.sampled_from([(1, False), (2, False), (2, True), (3, False)]),
    losses=st.lists(st.tuples(st.floats(0.0, 1.5), st.integers(0, 5)), max_size=2),
    slow=st.booleans(),
    caching=st.sampled_from([True, True, True, False]),
)
def test_any_workload_is_served_as_without_caching_and_leaves_nothing(
    load: Load,
    pools: tuple[int, int, int],
    blocks: int,
    in_flight: tuple[int, bool],
    losses: list[tuple[float, int]],
    slow: bool,
    caching: bool,
) -> None:
    """Forks, preemption, aborts, pulls that are cut, lost instances; every read of memory is checked."""
    delays = Delays(seconds_per_block=0.02 if slow else 0.0001)
    cluster = serving(
        load, pools, blocks, in_flight, headroom=0.0, prefix_caching=caching, delays=delays, remembers=True
    )
    cluster.lose_some(losses)
    cluster.run()
    cluster.assert_served()
    for scheduler in cluster.schedulers.values():
        assert scheduler.totals.num_hit_tokens <= scheduler.totals.num_queried_tokens
        assert caching or scheduler.totals.num_queried_tokens == 0


def test_conversations_pull_only_their_new_turns() -> None:
    config = SchedulerConfig(max_batch_tokens=64, max_batch_size=8, prefix_caching=True)
    cluster = Deployment(kv=KvConfig(400, SIZE), config=config, remembers=True)
    history: list[int] = list(range(1, 22))
    sizes = []
    for turn in range(5):
        one = replace(
            make_request(f"t{turn}", len(history), seed=12, arrival=2.0 * turn), prompt_token_ids=tuple(history)
        )
        cluster.submit(one)
        sizes.append(len(history))
        history += [*expected_tokens(one, 0), *range(100 * turn + 500, 100 * turn + 507)]
    recorder = cluster.run(until=30)
    pulled = [len(pull.src_blocks) for pull in recorder.pulls("decode-0")]
    assert pulled[0] == -(-sizes[0] // SIZE)
    # 7 new tokens and the answer's last one, on the decode side; on the prefill side the whole answer is new as well.
    assert all(count <= 4 for count in pulled[1:])
    computed = [sum(c.num_tokens for c in step.chunks) for step in recorder.steps("prefill-0")]
    assert sum(computed) < 0.5 * sum(sizes)
    cluster.assert_clean()


@pytest.mark.parametrize("caching", [False, True])
def test_cached_tokens_are_told_with_the_first_token(caching: bool) -> None:
    for pools in ((1, 1, 0), (0, 0, 1)):
        config = SchedulerConfig(max_batch_tokens=64, max_batch_size=8, prefix_caching=caching)
        cluster = Deployment(prefill=pools[0], decode=pools[1], mixed=pools[2], kv=KvConfig(200, SIZE), config=config)
        for i in range(2):
            cluster.submit(make_request(f"r{i}", 21, arrival=2.0 * i))
        recorder = cluster.run(until=10)
        told = [recorder.cached[name] for name in ("r0", "r1")]
        assert told == [0, 20 if caching else 0]
