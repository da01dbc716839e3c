"""Prompts first come, first served, within the batch's tokens; KV kept until pulled."""

from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.messages import (
    Abort,
    Accepted,
    DecodeAssigned,
    DecodeDropped,
    DecodeWanted,
    Failed,
    HandedOver,
    InstanceGone,
    Leased,
    Offer,
    Prefilled,
    Pulled,
    Refused,
    Renew,
    Withdrawn,
)
from distserve.core.prefill import PrefillScheduler
from tests.core.bench_instance import Bench
from tests.core.harness import make_request


def bench(budget: int = 32, blocks: int = 64, in_flight: int = 1, **limits: float) -> Bench:
    config = SchedulerConfig(max_batch_tokens=budget, max_batch_size=8, max_in_flight=in_flight, lease=5.0)
    return Bench(PrefillScheduler(InstanceSpec("prefill-0", Role.PREFILL, KvConfig(blocks, 4), config)))


@given(prompts=st.lists(st.integers(1, 100), min_size=1, max_size=12), in_flight=st.integers(1, 3))
def test_prompts_start_in_order_and_batches_keep_the_limit(prompts: list[int], in_flight: int) -> None:
    node = bench(blocks=500, in_flight=in_flight)
    for i, prompt in enumerate(prompts):
        node.submit(make_request(f"{i:02}", prompt))
    while node.launched:
        node.finish_step()
    started = []
    for step in node.steps:
        assert sum(chunk.num_tokens for chunk in step.chunks) <= 32
        for name, _, _ in node.named(step):
            if name not in started:
                started.append(name)
    assert started == sorted(started)
    assert len(started) == len(prompts)
    for i, prompt in enumerate(prompts):
        chunks = [c for step in node.steps for c in node.named(step) if c[0] == f"{i:02}"]
        assert sum(count for _, count, _ in chunks) == prompt
        assert [samples for _, _, samples in chunks] == [False] * (len(chunks) - 1) + [True]
        assert len(chunks) == 1 or prompt > 32, "a prompt that fits one batch is never split"


def test_a_long_prompts_rest_shares_its_batch_with_those_behind() -> None:
    node = bench()
    for name, prompt in (("long", 40), ("b", 16), ("c", 16)):
        node.submit(make_request(name, prompt))
    node.finish_step()
    node.finish_step()
    assert node.named(node.steps[0]) == [("long", 32, False)]
    assert node.named(node.steps[1]) == [("long", 8, True), ("b", 16, True)]
    assert node.named(node.steps[2]) == [("c", 16, True)]


def test_nobody_overtakes_a_prompt_that_waits_for_memory() -> None:
    node = bench(blocks=8)
    for name, prompt in (("a", 20), ("big", 16), ("small", 4)):
        node.submit(make_request(name, prompt))
    node.finish_step()
    assert not node.launched
    node.receive(Abort(("a", 0)), "api-0")
    assert [name for name, _, _ in node.named(node.launched[0][0])] == ["big", "small"]


def hand_off(node: Bench) -> None:
    node.receive(DecodeAssigned(("a", 0), "decode-0"))
    node.receive(Accepted(("a", 0)), "decode-0")


def test_the_decode_instance_is_asked_for_while_the_last_chunk_runs() -> None:
    node = bench()
    node.submit(make_request("a", 40))
    assert not node.messages(DecodeWanted)
    node.finish_step()
    assert node.messages(DecodeWanted) == [DecodeWanted(("a", 0), "api-0", 40, 1, 56)]
    hand_off(node)
    (offer,) = node.messages(Offer)
    assert isinstance(offer, Offer)
    assert (offer.num_tokens, offer.num_ready_tokens, offer.ready_step) == (40, 32, 1)
    assert node.messages(Leased) == [Leased(("a", 0), 5.0)]
    assert not node.messages(Prefilled)
    node.finish_step()
    assert len(node.messages(Prefilled)) == 1


def test_blocks_stay_until_pulled_and_the_owner_hears_who_is_in_charge() -> None:
    node = bench()
    node.submit(make_request("a", 20))
    hand_off(node)
    node.receive(Pulled(("a", 0)), "decode-0")
    assert node.scheduler.blocks.num_free == 64 - 5, "its own step still writes them"
    node.finish_step()
    assert node.scheduler.blocks.num_free == 64
    assert node.messages(HandedOver) == [HandedOver(("a", 0), "decode-0")]
    assert node.messages(Prefilled), "the decode side still needs the first token"


def test_a_refusal_asks_the_router_again_and_names_who_refused() -> None:
    node = bench()
    node.submit(make_request("a", 20))
    node.finish_step()
    node.receive(DecodeAssigned(("a", 0), "decode-0"))
    node.receive(Refused(("a", 0)), "decode-0")
    assert node.messages(DecodeWanted)[-1] == DecodeWanted(("a", 0), "api-0", 20, 1, 36, ("decode-0",))
    node.receive(DecodeAssigned(("a", 0), "decode-1"))
    node.receive(Accepted(("a", 0)), "decode-1")
    node.receive(Pulled(("a", 0)), "decode-1")
    assert node.scheduler.blocks.num_free == 64


def test_pulls_that_keep_failing_are_tried_later_each_time_and_end_the_attempt() -> None:
    """Where there is one decode instance, and it cannot read this one's memory, asking again would never end."""
    node = bench()
    node.submit(make_request("a", 20))
    node.finish_step()
    for num_asked, pause in enumerate((0.0, 0.0, 1.0, 2.0), 1):
        assert not node.messages(Failed)
        if pause:
            node.tick(pause - 0.01)
            assert len(node.messages(DecodeWanted)) == num_asked - 1
            node.tick(0.02)
        assert len(node.messages(DecodeWanted)) == num_asked
        hand_off(node)
        node.receive(Refused(("a", 0)), "decode-0")
    assert len(node.messages(Failed)) == 1
    assert node.scheduler.blocks.num_free == 64


def test_a_refusal_after_a_failed_pull_waits_for_nothing_and_a_pause_ends_no_lease() -> None:
    node = bench()
    for name in "ab":
        node.submit(make_request(name, 12))
    node.finish_step()
    for _ in range(2):
        hand_off(node)
        node.receive(Refused(("a", 0)), "decode-0")
    node.receive(DecodeAssigned(("b", 0), "decode-0"))
    node.tick(1.5)
    assert [wanted.key for wanted in node.messages(DecodeWanted)] == [("a", 0), ("b", 0), ("a", 0), ("a", 0)]
    node.receive(DecodeAssigned(("a", 0), "decode-0"))
    node.receive(Refused(("a", 0)), "decode-0")
    assert len(node.messages(DecodeWanted)) == 5, "it has no room: another one may have some"
    assert not node.messages(Failed)
    node.tick(4.0)
    assert [failed.key for failed in node.messages(Failed)] == [("b", 0)], "its offer was never answered"


def test_a_lost_decode_instance_is_replaced() -> None:
    node = bench()
    node.submit(make_request("a", 20))
    node.finish_step()
    hand_off(node)
    node.receive(InstanceGone("decode-0"))
    assert len(node.messages(DecodeWanted)) == 2
    node.receive(Pulled(("a", 0)), "decode-0")
    assert node.scheduler.blocks.num_free < 64, "a late word of the lost one counts for nothing"


def test_an_unrenewed_lease_ends_the_attempt() -> None:
    node = bench()
    node.submit(make_request("a", 20))
    node.finish_step()
    hand_off(node)
    node.tick(4.0)
    node.receive(Renew(("a", 0)), "decode-0")
    node.tick(4.0)
    assert not node.messages(Failed)
    node.tick(2.0)
    assert len(node.messages(Failed)) == 1
    assert ("decode-0", Withdrawn(("a", 0))) in node.sent
    assert node.scheduler.blocks.num_free == 64


def test_abort_at_every_state_frees_everything() -> None:
    def queued(node: Bench) -> None:
        node.submit(make_request("first", 32))
        node.submit(make_request("a", 20))

    def running(node: Bench) -> None:
        node.submit(make_request("a", 20))

    def wanted(node: Bench) -> None:
        running(node)
        node.finish_step()

    def offered(node: Bench) -> None:
        wanted(node)
        node.receive(DecodeAssigned(("a", 0), "decode-0"))

    def leased(node: Bench) -> None:
        wanted(node)
        hand_off(node)

    def paused(node: Bench) -> None:
        wanted(node)
        for _ in range(2):
            hand_off(node)
            node.receive(Refused(("a", 0)), "decode-0")

    for state in (queued, running, wanted, offered, leased, paused):
        node = bench()
        state(node)
        node.receive(Abort(("a", 0)), "api-0")
        node.receive(Abort(("first", 0)), "api-0")
        while node.launched:
            node.finish_step()
        assert node.scheduler.blocks.num_free == 64, state.__name__
        assert node.worker.num_open == 0, state.__name__
        if state is offered or state is leased:
            assert ("decode-0", Withdrawn(("a", 0))) in node.sent
        if state is not queued and state is not leased:
            decode_id = "decode-0" if state is offered else None
            assert ("router", DecodeDropped(("a", 0), decode_id)) in node.sent


def test_an_answer_that_comes_too_late_is_given_back() -> None:
    node = bench()
    node.submit(make_request("a", 20))
    node.receive(Abort(("a", 0)), "api-0")
    node.receive(DecodeAssigned(("a", 0), "decode-0"))
    assert node.sent[-1] == ("router", DecodeDropped(("a", 0), "decode-0"))
    node.receive(Accepted(("a", 0)), "decode-0")
    assert node.sent[-1] == ("decode-0", Withdrawn(("a", 0)))


def test_several_batches_may_be_in_flight_but_a_prompt_is_in_one() -> None:
    node = bench(in_flight=2)
    node.submit(make_request("long", 70))
    node.submit(make_request("b", 20))
    assert [node.named(step) for step, _ in node.launched] == [[("long", 32, False)], [("b", 20, True)]]
