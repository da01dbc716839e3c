"""Prompts that begin alike share blocks: nothing is computed twice, nothing wrong is read, nothing leaks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.messages import Abort, DecodeAssigned, Failed, Offer, Report
from distserve.core.mixed import MixedScheduler
from distserve.core.prefill import PrefillScheduler
from distserve.core.request import Request
from tests.core.bench_instance import Bench
from tests.core.harness import expected_tokens, make_request
from tests.core.remembering_worker import RememberingWorker

SIZE = 4
BUDGET = 24


def config(*, caching: bool = True, in_flight: int = 1, lookahead: bool = False) -> SchedulerConfig:
    return SchedulerConfig(
        max_batch_tokens=BUDGET,
        max_batch_size=16,
        max_in_flight=in_flight,
        lookahead=lookahead,
        headroom=0.0,
        prefix_caching=caching,
    )


def mixed(
    blocks: int = 400,
    policy: PrefillPolicy = PrefillPolicy.SPLITFUSE,
    *,
    caching: bool = True,
    lookahead: bool = False,
) -> Bench:
    limits = config(caching=caching, in_flight=1 + lookahead, lookahead=lookahead)
    spec = InstanceSpec("mixed-0", Role.MIXED, KvConfig(blocks, SIZE), replace(limits, policy=policy))
    return Bench(MixedScheduler(spec), RememberingWorker)


def prefill(blocks: int = 400, *, caching: bool = True, in_flight: int = 1) -> Bench:
    spec = InstanceSpec("prefill-0", Role.PREFILL, KvConfig(blocks, SIZE), config(caching=caching, in_flight=in_flight))
    return Bench(PrefillScheduler(spec), RememberingWorker)


def request(name: str, *parts: tuple[int, int], n: int = 1, seed: int = 20, arrival: float = 0.0) -> Request:
    """A prompt of (kind, length) parts: equal kinds are equal tokens."""
    tokens = tuple(1000 * kind + place for kind, length in parts for place in range(length))
    return replace(make_request(name, len(tokens), seed=seed, n=n, arrival=arrival), prompt_token_ids=tokens)


def run_out(node: Bench, limit: int = 3000) -> None:
    while node.launched:
        node.finish_step()
        limit -= 1
        assert limit, "the scheduler does not come to an end"


def output(node: Bench, name: str, choice: int = 0) -> list[int]:
    return [o.token_id for o in node.outputs() if (o.request_id, o.choice) == (name, choice)]


def computed(node: Bench, name: str) -> int:
    """Tokens of its prompt that were computed."""
    chunks = [c for step in node.steps for c in node.named(step) if c[0] == name]
    first_token = next(index for index, (_, _, samples) in enumerate(chunks) if samples)
    return sum(count for _, count, _ in chunks[: first_token + 1])


PARTS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([3, 8, 16, 30])), min_size=1, max_size=3)
WORKLOAD = st.lists(
    st.tuples(PARTS, st.integers(0, 40), st.integers(1, 3), st.integers(0, 6), st.booleans()), min_size=1, max_size=10
)


@given(
    workload=WORKLOAD,
    blocks=st.integers(29, 120),
    policy=st.sampled_from(list(PrefillPolicy)),
    lookahead=st.booleans(),
    caching=st.booleans(),
    abort=st.none() | st.integers(0, 30),
)
def test_a_mixed_instance_serves_everything_right(
    workload: list[tuple[list[tuple[int, int]], int, int, int, bool]],
    blocks: int,
    policy: PrefillPolicy,
    lookahead: bool,
    caching: bool,
    abort: int | None,
) -> None:
    """Under forks, preemption, aborts and requests for a prompt's log-probabilities; with caching and without."""
    node = mixed(blocks, policy, caching=caching, lookahead=lookahead)
    requests = []
    for i, (parts, seed, n, delay, wants_logprobs) in enumerate(workload):
        for _ in range(delay):
            if node.launched:
                node.finish_step()
        one = request(f"r{i:02}", *parts, n=n, seed=seed, arrival=node.now)
        if wants_logprobs and seed % 4 == 0:
            one = replace(one, sampling=replace(one.sampling, prompt_logprobs=0))
        requests.append(one)
        node.submit(one)
    aborted = None
    if abort is not None:
        for _ in range(abort):
            if node.launched:
                node.finish_step()
        aborted = requests[0].request_id
        node.receive(Abort((aborted, 0)))
    run_out(node)
    for step in node.steps:
        if policy is PrefillPolicy.SPLITFUSE:
            assert sum(chunk.num_tokens for chunk in step.chunks) <= BUDGET
    for one in requests:
        for choice in one.choices:
            expected = expected_tokens(one, choice)
            got = output(node, one.request_id, choice)
            assert got == (expected[: len(got)] if one.request_id == aborted else expected)
    assert node.scheduler.blocks.num_free == blocks
    assert not node.scheduler.blocks.has_shared
    assert node.worker.num_open == 0
    assert caching or node.scheduler.totals.num_hit_tokens == 0


@pytest.mark.parametrize("make", [mixed, prefill])
def test_a_prompt_starts_behind_what_it_has_in_common_with_an_earlier_one(make: Callable[[], Bench]) -> None:
    node = make()
    node.submit(request("a", (0, 21)))
    run_out(node)
    node.submit(request("b", (0, 21), (1, 7)))
    node.submit(request("c", (0, 10), (1, 7)))
    run_out(node)
    assert [computed(node, name) for name in "abc"] == [21, 28 - 20, 17 - 8]
    assert node.scheduler.totals.num_hit_tokens == 28


def test_the_last_token_is_computed_in_any_case() -> None:
    node = mixed()
    for name in "ab":
        node.submit(request(name, (0, 16)))
        run_out(node)
    assert [computed(node, name) for name in "ab"] == [16, 4]


def test_what_is_kept_can_be_bounded() -> None:
    limits = replace(config(), prefix_cache_tokens=3 * SIZE)
    node = Bench(MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KvConfig(400, SIZE), limits)), RememberingWorker)
    for name in "ab":
        node.submit(request(name, (0, 30)))
        run_out(node)
    assert computed(node, "b") == 30 - 3 * SIZE, "the head of what was there"


def test_answers_are_found_too() -> None:
    node = mixed()
    node.submit(request("a", (0, 10)))
    run_out(node)
    answer = output(node, "a")
    turn = replace(request("b"), prompt_token_ids=(*range(10), *answer, 7, 8, 9))
    node.submit(turn)
    run_out(node)
    # The last token of an answer is never computed.
    assert computed(node, "b") == len(turn.prompt_token_ids) - (10 + len(answer) - 1) // SIZE * SIZE


def test_prompts_of_one_step_share_what_it_computes() -> None:
    node = mixed()
    node.submit(request("long", (1, 30)))
    node.submit(request("a", (0, 9)))
    node.submit(request("b", (0, 9)))
    run_out(node)
    assert node.named(node.steps[1]) == [("long", 6, True), ("a", 9, True), ("b", 1, True)]


def test_blocks_in_use_by_others_are_not_needed_twice() -> None:
    node = mixed(blocks=11)
    node.submit(request("a", (0, 21)))
    node.finish_step()
    node.submit(request("b", (0, 21), arrival=1.0))
    node.finish_step()
    assert {name for name, _, _ in node.named(node.launched[0][0])} == {"a", "b"}, "6 blocks and 1 of its own"
    run_out(node)
    assert node.scheduler.blocks.num_free == 11


def test_idle_blocks_that_are_found_count_as_needed() -> None:
    node = mixed(blocks=9)
    node.submit(request("a", (0, 20)))
    run_out(node)
    node.submit(request("other", (1, 19), arrival=1.0))
    node.submit(request("b", (0, 20), arrival=2.0))
    assert [name for name, _, _ in node.named(node.launched[0][0])] == ["other"], "5 and 6 are more than 9"
    run_out(node)
    assert output(node, "b") == expected_tokens(request("b", (0, 20)), 0)


def test_log_probabilities_of_a_prompt_are_not_taken_from_elsewhere() -> None:
    node = mixed()
    node.submit(request("a", (0, 20)))
    run_out(node)
    asking = request("b", (0, 20))
    node.submit(replace(asking, sampling=replace(asking.sampling, prompt_logprobs=1)))
    run_out(node)
    assert computed(node, "b") == 20


def test_given_keys_stand_for_the_tokens() -> None:
    node = mixed()
    for name, keys in (("a", (1, 2, 3)), ("b", (1, 2, 9)), ("c", ())):
        # Fake tokens, all alike; the checking of memory needs them to be those that the keys say.
        parts = {"a": ((0, 14),), "b": ((0, 8), (1, 6)), "c": ((0, 14),)}[name]
        node.submit(replace(request(name, *parts), block_keys=keys))
        run_out(node)
    assert [computed(node, name) for name in "abc"] == [14, 6, 14]


def test_what_a_failed_step_was_to_compute_is_not_found() -> None:
    node = mixed()
    node.submit(request("long", (1, 30)))
    node.submit(request("a", (0, 9)))
    node.submit(request("b", (0, 9)))
    node.finish_step()
    node.fail_step()
    assert {failed.key[0] for failed in node.messages(Failed)} == {"long", "a", "b"}
    node.submit(request("again", (0, 9)))
    node.submit(request("long again", (1, 30)))
    run_out(node)
    assert [computed(node, name) for name in ("again", "long again")] == [9, 30 - 24]
    assert node.scheduler.blocks.num_free == 400


def test_who_goes_on_from_what_a_failed_step_was_to_compute_fails_with_it() -> None:
    node = mixed(lookahead=True)
    for place, (name, part) in enumerate({"long": (2, 40), "a": (0, 24), "b": (0, 26), "c": (1, 9)}.items()):
        node.submit(request(name, part, arrival=float(place)))
    node.finish_step()
    node.finish_step()
    in_flight = [node.named(step) for step, _ in node.launched]
    assert in_flight == [
        [("long", 1, True), ("a", 23, False)],
        [("long", 1, True), ("a", 1, True), ("b", 2, True), ("c", 9, True)],
    ]
    node.fail_step()
    assert [failed.key[0] for failed in node.messages(Failed)] == ["long", "a", "b"]
    run_out(node)
    assert output(node, "c") == expected_tokens(request("c", (1, 9)), 0)
    node.submit(request("d", (0, 24), arrival=3.0))
    run_out(node)
    assert computed(node, "d") == 24
    assert node.scheduler.blocks.num_free == 400


@given(
    prompts=st.lists(PARTS, min_size=1, max_size=12),
    in_flight=st.integers(1, 3),
    blocks=st.integers(40, 120),
    caching=st.booleans(),
)
def test_a_prefill_instance_computes_every_prompt_once_and_in_order(
    prompts: list[list[tuple[int, int]]], in_flight: int, blocks: int, caching: bool
) -> None:
    node = prefill(blocks, in_flight=in_flight, caching=caching)
    requests = [request(f"{i:02}", *parts) for i, parts in enumerate(prompts)]
    for one in requests:
        # One output token: nothing is handed over, blocks are free when the prompt is done.
        node.submit(replace(one, sampling=replace(one.sampling, max_tokens=1)))
    run_out(node)
    started = list(dict.fromkeys(name for step in node.steps for name, _, _ in node.named(step)))
    assert started == sorted(started)
    assert len(started) == len(prompts)
    for step in node.steps:
        assert sum(chunk.num_tokens for chunk in step.chunks) <= BUDGET
    total = sum(len(one.prompt_token_ids) for one in requests)
    assert sum(chunk.num_tokens for step in node.steps for chunk in step.chunks) == (
        total - node.scheduler.totals.num_hit_tokens
    )
    assert node.scheduler.blocks.num_free == blocks
    assert node.worker.num_open == 0
    node.tick(2.0)
    assert node.messages(Report)[-1].num_waiting_tokens == 0


def test_a_hand_off_names_shared_blocks_and_calls_ready_what_is() -> None:
    node = prefill()
    node.submit(request("a", (0, 20)))
    node.submit(request("b", (0, 20), (1, 9)))
    node.receive(DecodeAssigned(("a", 0), "decode-0"))
    node.finish_step()
    node.receive(DecodeAssigned(("b", 0), "decode-0"))
    first, second = node.messages(Offer)
    assert isinstance(first, Offer)
    assert isinstance(second, Offer)
    assert second.blocks[:5] == first.blocks
    assert len(second.blocks) == 8
    assert (first.num_ready_tokens, second.num_ready_tokens) == (0, 20)


def test_blocks_that_another_step_in_flight_computes_are_not_ready() -> None:
    node = prefill(in_flight=2)
    node.submit(request("a", (0, 20)))
    node.submit(request("b", (0, 20), (1, 9)))
    assert len(node.launched) == 2
    node.receive(DecodeAssigned(("b", 0), "decode-0"))
    (offer,) = node.messages(Offer)
    assert isinstance(offer, Offer)
    assert (offer.num_ready_tokens, offer.ready_step) == (0, 1)
