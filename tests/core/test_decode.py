"""Continuous batching on pulled KV: admission, growth, preemption, lookahead, horizon."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.decode import DecodeScheduler
from distserve.core.events import NOT_FINITE
from distserve.core.messages import (
    Abort,
    Accepted,
    Failed,
    InstanceGone,
    Leased,
    Offer,
    Preempted,
    Prefilled,
    Pulled,
    Refused,
    Renew,
    Withdrawn,
)
from distserve.core.request import Request
from tests.core.bench_instance import Bench
from tests.core.harness import expected_tokens, make_request


def bench(
    blocks: int = 64, size: int = 8, in_flight: int = 1, headroom: float = 0.0, *, lookahead: bool = False
) -> Bench:
    config = SchedulerConfig(
        max_batch_size=size, max_in_flight=in_flight, lookahead=lookahead, headroom=headroom, lease=5.0
    )
    return Bench(DecodeScheduler(InstanceSpec("decode-0", Role.DECODE, KvConfig(blocks, 4), config)))


def offer(request: Request) -> Offer:
    return Offer(request, tuple(range(-(-request.num_prefill_tokens // 4))), request.num_prefill_tokens, 0, 0)


def test_memory_is_reserved_on_offer_or_refused() -> None:
    node = bench(blocks=10, headroom=0.2)
    node.admit(make_request("a", 12, seed=20))
    node.receive(offer(make_request("b", 16)), "prefill-0")
    assert node.sent[-1] == ("prefill-0", Refused(("b", 0)))
    node.receive(offer(make_request("c", 8)), "prefill-0")
    assert ("prefill-0", Accepted(("c", 0))) in node.sent
    assert node.scheduler.blocks.num_free == 10 - 4 - 3


def test_a_batch_with_no_place_left_refuses() -> None:
    node = bench(size=2)
    node.admit(make_request("a", 4, seed=20))
    node.admit(make_request("b", 4, seed=20))
    node.receive(offer(make_request("c", 4)), "prefill-0")
    assert ("prefill-0", Refused(("c", 0))) in node.sent


def test_decoding_starts_when_kv_and_first_token_are_both_there() -> None:
    for kv_first in (True, False):
        node = bench()
        request = make_request("a", 10, seed=20)
        node.receive(offer(request), "prefill-0")
        node.receive(Leased(("a", 0), 5.0), "prefill-0")
        if kv_first:
            node.finish_pull()
            assert not node.launched
        node.receive(Prefilled(("a", 0), (expected_tokens(request, 0)[0],)), "prefill-0")
        if not kv_first:
            assert not node.launched
            node.finish_pull()
        assert node.launched
        assert ("prefill-0", Pulled(("a", 0))) in node.sent


def test_a_pull_that_outlives_its_lease_is_not_trusted() -> None:
    node = bench()
    node.receive(offer(make_request("a", 10)), "prefill-0")
    node.now += 1.0
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.tick(4.5)
    node.finish_pull()
    assert ("prefill-0", Refused(("a", 0))) in node.sent, "the lease counts from the sending of Accepted"
    assert node.scheduler.blocks.num_free == 64


def test_a_renewed_lease_counts_from_the_renewal() -> None:
    node = bench()
    node.receive(offer(make_request("a", 10)), "prefill-0")
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.tick(3.0)
    assert ("prefill-0", Renew(("a", 0))) in node.sent
    node.tick(1.0)
    assert node.messages(Renew) == [Renew(("a", 0))], "asked once"
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.tick(3.0)
    node.finish_pull()
    assert ("prefill-0", Pulled(("a", 0))) in node.sent


def test_leases_asked_for_at_different_times_are_all_renewed() -> None:
    node = bench()
    for name in ("a", "b"):
        node.receive(offer(make_request(name, 10)), "prefill-0")
        node.receive(Leased((name, 0), 5.0), "prefill-0")
        node.tick(1.0)
    node.tick(0.5)
    assert node.messages(Renew) == [Renew(("a", 0))]
    node.tick(1.0)
    assert node.messages(Renew) == [Renew(("a", 0)), Renew(("b", 0))]


def test_a_lease_that_is_granted_as_another_is_to_be_renewed_does_not_put_it_off() -> None:
    """The timer may be due, and not have been fed yet."""
    node = bench()
    node.receive(offer(make_request("a", 10)), "prefill-0")
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.now += 2.5
    node.receive(offer(make_request("b", 10)), "prefill-0")
    node.receive(Leased(("b", 0), 5.0), "prefill-0")
    node.tick(0.0)
    assert node.messages(Renew) == [Renew(("a", 0))]


def test_a_failed_pull_is_refused_and_freed() -> None:
    node = bench()
    node.receive(offer(make_request("a", 10)), "prefill-0")
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.finish_pull(ok=False)
    assert ("prefill-0", Refused(("a", 0))) in node.sent
    assert node.scheduler.blocks.num_free == 64


def test_blocks_of_a_cancelled_pull_wait_for_the_transport() -> None:
    for end in (Withdrawn(("a", 0)), Abort(("a", 0)), InstanceGone("prefill-0")):
        node = bench()
        node.receive(offer(make_request("a", 10)), "prefill-0")
        node.receive(Leased(("a", 0), 5.0), "prefill-0")
        node.receive(end, "prefill-0")
        assert node.cancelled == [1]
        assert node.scheduler.blocks.num_free < 64
        node.finish_pull(ok=False)
        assert node.scheduler.blocks.num_free == 64


def test_the_youngest_is_preempted_and_its_owner_told() -> None:
    node = bench(blocks=7)
    for i, name in enumerate(("old", "mid", "young")):
        node.admit(make_request(name, 4, seed=20, arrival=float(i)))
    preempted = []
    while not preempted:
        node.finish_step()
        preempted = node.messages(Preempted)
    assert preempted == [Preempted(("young", 0), 0)]
    while node.launched:
        node.finish_step()
    produced = [output.token_id for output in node.outputs() if output.request_id == "old"]
    assert produced == expected_tokens(make_request("old", 4, seed=20), 0)[1:]


def test_logits_that_are_not_finite_fail_their_request_alone() -> None:
    node = bench()
    node.admit(make_request("a", 10, seed=20))
    node.admit(make_request("b", 10, seed=20))
    node.finish_step()
    step, done = node.launched.pop(0)
    node.launched.insert(0, (step, replace(done, tokens=(NOT_FINITE, done.tokens[1]))))
    node.finish_step()
    (failed,) = node.messages(Failed)
    assert (failed.key, failed.status) == (("a", 0), 500)
    assert [name for name, _, _ in node.named(node.launched[0][0])] == ["b"]


def test_lookahead_discards_the_overrun() -> None:
    node = bench(in_flight=2, lookahead=True)
    request = make_request("a", 4, seed=5)
    node.admit(request)
    assert len(node.launched) == 2
    while node.launched:
        node.finish_step()
    assert [output.token_id for output in node.outputs()] == expected_tokens(request, 0)[1:]
    assert len(node.steps) == len(expected_tokens(request, 0)), "one token too many was computed"
    assert node.scheduler.blocks.num_free == 64


def test_pipeline_stages_share_the_running_sequences() -> None:
    node = bench(in_flight=2)
    for i in range(4):
        node.admit(make_request(f"r{i}", 4, seed=20, arrival=float(i)))
    for _ in range(4):
        node.finish_step()
    sizes = [len(step.chunks) for step, _ in node.launched]
    assert sizes == [2, 2]


def test_an_unchanged_batch_is_the_identical_tuple() -> None:
    node = bench()
    node.admit(make_request("a", 4, seed=20))
    node.admit(make_request("b", 4, seed=20))
    node.finish_step()
    node.finish_step()
    assert node.steps[-1].chunks is node.steps[-2].chunks


def test_abort_while_a_step_runs_frees_within_that_step() -> None:
    node = bench()
    node.admit(make_request("a", 10, seed=20))
    node.receive(Abort(("a", 0)), "api-0")
    assert node.scheduler.blocks.num_free < 64
    node.finish_step()
    assert node.scheduler.blocks.num_free == 64
    assert node.worker.num_open == 0


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(2, 22)), min_size=1, max_size=6),
    blocks=st.integers(12, 60),
    warm_up=st.integers(0, 4),
)
def test_over_its_horizon_the_batch_stays(prompts: list[tuple[int, int]], blocks: int, warm_up: int) -> None:
    node = bench(blocks=blocks)
    for i, (prompt, max_tokens) in enumerate(prompts):
        request = make_request(f"r{i}", prompt, seed=22, max_tokens=max_tokens, arrival=float(i))
        node.receive(offer(request), "prefill-0")
        if node.messages(Refused):
            break
        node.receive(Leased(request.key, 10.0), "prefill-0")
        node.receive(Prefilled(request.key, (1,)), "prefill-0")
        node.finish_pull()
    for _ in range(warm_up):
        if node.launched:
            node.finish_step()
    if not node.launched:
        return
    launched, preempted = len(node.steps), len(node.messages(Preempted))
    horizon = node.scheduler.horizon()
    for _ in range(horizon):
        node.finish_step()
    batches = {tuple(chunk.seq_id for chunk in step.chunks) for step in node.steps[launched:]}
    assert len(node.steps) - launched == horizon
    assert len(batches) <= 1
    assert len(node.messages(Preempted)) == preempted


def test_the_last_offer_of_a_lost_instance_reserves_nothing() -> None:
    node = bench()
    node.receive(InstanceGone("prefill-0"), "router")
    node.receive(offer(make_request("a", 10)), "prefill-0")
    assert node.scheduler.blocks.num_free == 64
    assert not any(isinstance(message, Accepted) for _, message in node.sent)


def test_a_request_whose_first_token_died_with_its_source_fails_towards_its_owner() -> None:
    """The prefill instance may have told the owner that it handed the request over, and not this one."""
    node = bench()
    node.receive(offer(make_request("a", 10)), "prefill-0")
    node.receive(Leased(("a", 0), 5.0), "prefill-0")
    node.finish_pull()
    node.receive(InstanceGone("prefill-0"), "router")
    assert node.sent[-1] == ("api-0", Failed(("a", 0), "prefill-0 was lost"))
    assert node.scheduler.blocks.num_free == 64
