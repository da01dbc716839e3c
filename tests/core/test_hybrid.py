"""Prefill beside mixed instances: which prompts stay, and mixed instances that take KV in."""

from dataclasses import replace
from math import exp, inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core.commands import Send
from distserve.core.config import SLO, InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.events import Event, InstanceUp, Received, Timer
from distserve.core.hybrid import RecentTokens, interval, strain
from distserve.core.messages import (
    Accepted,
    DecodeAssigned,
    DecodeWanted,
    Failed,
    Hello,
    InstanceGone,
    Leased,
    Message,
    Offer,
    Prefill,
    Prefilled,
    Pulled,
    Refused,
    Rejected,
    Report,
    RequestKey,
    Status,
    Submit,
)
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request
from distserve.core.router import Router, RouterConfig
from simulator.model import Delays
from tests.core.any_load import Load, loads, serving
from tests.core.bench_instance import Bench
from tests.core.harness import Deployment, expected_tokens, make_request, token_at

OBJECTIVE = SLO(ttft=1.0, tpot=0.02)
CONFIG = SchedulerConfig(max_batch_tokens=64, max_batch_size=8, headroom=0.0)

# -- the rule ----------------------------------------------------------------------------------------------------------


@given(
    step=st.floats(1e-4, 0.1),
    cost=st.floats(0, 1e-3),
    tokens=st.floats(0, 1e5),
    more=st.floats(0, 1e4),
    window=st.floats(0.1, 10),
)
def test_prompts_lengthen_the_interval_until_they_take_all_the_time(
    step: float, cost: float, tokens: float, more: float, window: float
) -> None:
    without = interval(step, cost, 0.0, window)
    assert without == step
    assert step <= interval(step, cost, tokens, window) <= interval(step, cost, tokens + more, window)
    assert interval(step, 1e-3, 1001 * window, window) == inf


def test_an_interval_is_what_steps_take_when_the_prompts_of_a_window_are_spread_over_them() -> None:
    # In 2 s there are 80 steps of 20 ms, and prompts that take 0.4 s more.
    assert interval(0.020, 0.001, 400, 2.0) == pytest.approx(2.0 / 80)


def test_strain_goes_by_what_is_closer_to_its_bound() -> None:
    assert strain(0.9, 0.0, OBJECTIVE) > strain(0.5, 0.016, OBJECTIVE)
    assert strain(0.1, 0.019, OBJECTIVE) > strain(0.8, 0.004, OBJECTIVE)
    assert strain(0.1, inf, OBJECTIVE) == inf


def test_recent_tokens_fade() -> None:
    recent = RecentTokens(window=2.0)
    assert recent.at(5.0) == 0.0
    recent.add(5.0, 100)
    recent.add(7.0, 50)
    assert recent.at(7.0) == pytest.approx(100 * exp(-1) + 50)
    assert recent.at(9.0) == pytest.approx(100 * exp(-2) + 50 * exp(-1))


# -- the router --------------------------------------------------------------------------------------------------------


class Switchboard:
    """A router, and what it sent last. Instances compute 1000 prompt tokens/s and decode in steps of 10 ms."""

    def __init__(self, *instances: str, slo: SLO = OBJECTIVE, kv: KvConfig = KvConfig(1000, 4)) -> None:
        self.router = Router(RouterConfig(max_wait=10.0, slo=slo))
        self.now = 0.0
        self.status = Status(())
        for name in instances:
            self.feed(InstanceUp(InstanceSpec(name, Role(name.partition("-")[0]), kv, CONFIG)))
        self.feed(Received("api-0", Hello()))
        for name in instances:
            self.report(name)

    def feed(self, event: Event) -> list[tuple[str, Message]]:
        commands = self.router.handle(self.now, event)
        sent = [(command.to, command.message) for command in commands if isinstance(command, Send)]
        for _, message in sent:
            self.status = message if isinstance(message, Status) else self.status
        return [item for item in sent if not isinstance(item[1], Status)]

    def report(
        self,
        name: str,
        *,
        waiting: int = 0,
        launched: int = 0,
        free: int = 1000,
        step: float = 0.01,
        seen: tuple[RequestKey, ...] = (),
    ) -> list[tuple[str, Message]]:
        report = Report(
            name,
            0,
            waiting,
            1,
            free,
            seen,
            prefill_rate=1000.0,
            step_seconds=step,
            prompt_rate=1000.0,
            prompt_seconds=0.05 / (1000 * (step + 0.05)),
            num_launched_tokens=launched,
        )
        return self.feed(Received(name, report))

    def submit(self, name: str, prompt: int, max_tokens: int = 16) -> str:
        sent = self.feed(Received("api-0", Submit(make_request(name, prompt, max_tokens=max_tokens))))
        return next(to for to, message in sent if isinstance(message, Prefill))


def test_long_prompts_go_to_prefill_instances_while_these_keep_up() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    assert board.submit("a", 300) == "prefill-0"


def test_prompts_stay_when_the_prefill_pool_is_the_bottleneck() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=900)
    assert board.submit("a", 100) == "mixed-0"


def test_a_step_under_way_has_to_end_first() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", launched=900)
    assert board.submit("a", 100) == "mixed-0"
    board.now = 0.9
    assert board.submit("b", 100) == "prefill-0"


def test_what_waits_and_what_a_step_under_way_computes_is_reported() -> None:
    node = bench(budget=24)
    node.submit(make_request("a", 1000))
    for _ in range(30):
        node.finish_step()
    loads = [(report.num_waiting_tokens, report.num_launched_tokens) for report in node.messages(Report)]
    assert len([waiting for waiting, _ in loads if waiting]) > 1
    assert all((1000 - waiting) % 24 == 0 and launched == 23 for waiting, launched in loads if waiting)


def test_decoding_that_has_nothing_to_spare_takes_no_prompts() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=500)
    board.report("mixed-0", step=0.019)
    assert board.submit("a", 400) == "prefill-0"


def test_what_a_prompt_costs_decoding_is_held_against_its_waiting() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=500)
    board.report("mixed-0", step=0.01)
    assert board.submit("short", 10) == "mixed-0"
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=300)
    board.report("mixed-0", step=0.016)
    assert board.submit("long", 500) == "prefill-0"


def test_short_prompts_stay_while_nothing_is_near_its_bound() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    assert board.submit("short", 1) == "mixed-0"
    assert board.submit("longer", 20) == "prefill-0"
    board.report("mixed-0", step=0.018, seen=(("short", 0),))
    assert board.submit("pressed", 1) == "prefill-0"


def test_prompts_that_were_sent_of_late_count() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=900)
    took = []
    for i in range(20):
        took.append(board.submit(f"r{i}", 100))
        board.report("prefill-0", waiting=900, seen=((f"r{i}", 0),))
        board.report("mixed-0", seen=((f"r{i}", 0),))
    assert took[0] == "mixed-0"
    assert 1 < took.count("mixed-0") < 20, "a prompt more or less changes little; many change the interval"
    board.now = 25.0
    board.report("prefill-0", waiting=900)
    board.report("mixed-0")
    assert board.submit("later", 100) == "mixed-0"


def test_computed_prompts_have_memory_before_local_ones() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("mixed-0", free=20)
    assert board.feed(Received("prefill-0", DecodeWanted(("a", 0), "api-0", 200, 1, 200))) == []
    board.report("prefill-0", waiting=900)
    assert board.submit("b", 8) == "prefill-0"
    answered = board.report("mixed-0")
    assert answered == [("prefill-0", DecodeAssigned(("a", 0), "mixed-0"))]
    assert board.submit("c", 8) == "mixed-0"


def test_memory_that_waiting_prompts_will_take_is_promised_to_nobody_else() -> None:
    board = Switchboard("prefill-0", "mixed-0", "mixed-1")
    board.report("mixed-0", waiting=3800)
    board.report("mixed-1", free=100)
    sent = board.feed(Received("prefill-0", DecodeWanted(("a", 0), "api-0", 200, 1, 200)))
    assert sent == [("prefill-0", DecodeAssigned(("a", 0), "mixed-1"))]


def test_without_room_to_decode_a_prompt_does_not_stay() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.report("prefill-0", waiting=900)
    board.report("mixed-0", free=10)
    assert board.submit("a", 100) == "prefill-0"


def test_decisions_are_counted() -> None:
    board = Switchboard("prefill-0", "mixed-0")
    board.submit("a", 300)
    board.report("prefill-0", waiting=900)
    board.submit("b", 100)
    board.now = 1.5
    board.feed(Timer())
    assert (board.status.num_local_prefills, board.status.num_remote_prefills) == (1, 1)


def test_what_no_mixed_instance_can_hold_to_its_end_is_refused_where_only_they_could_compute_it() -> None:
    board = Switchboard("prefill-0", "mixed-0", kv=KvConfig(40, 4))
    sent = board.feed(Received("api-0", Submit(make_request("a", 150, max_tokens=20))))
    assert [message.status for _, message in sent if isinstance(message, Rejected)] == [400]


# -- mixed instances that take KV in -----------------------------------------------------------------------------------


def bench(
    *,
    budget: int = 24,
    blocks: int = 400,
    in_flight: int = 1,
    policy: PrefillPolicy = PrefillPolicy.SPLITFUSE,
    caching: bool = False,
) -> Bench:
    config = SchedulerConfig(
        max_batch_tokens=budget,
        max_batch_size=8,
        max_in_flight=in_flight,
        lookahead=in_flight > 1,
        headroom=0.0,
        policy=policy,
        prefix_caching=caching,
    )
    return Bench(MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KvConfig(blocks, 4), config)))


def offer(request: Request) -> Offer:
    return Offer(request, tuple(range(-(-request.num_prefill_tokens // 4))), request.num_prefill_tokens, 0, 0)


def run_out(node: Bench) -> None:
    for _ in range(3000):
        if not node.launched:
            return
        node.finish_step()
    raise AssertionError("the scheduler does not come to an end")


def tokens_of(node: Bench, request: Request, choice: int = 0) -> list[int]:
    return [o.token_id for o in node.outputs() if (o.request_id, o.choice) == (request.request_id, choice)]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    workload=st.lists(
        st.tuples(st.booleans(), st.integers(1, 60), st.integers(1, 40), st.integers(1, 2), st.integers(0, 4)),
        min_size=1,
        max_size=8,
    ),
    blocks=st.integers(30, 120),
    in_flight=st.sampled_from([1, 2]),
    policy=st.sampled_from(PrefillPolicy),
)
def test_sequences_from_elsewhere_run_beside_those_that_started_here(
    workload: list[tuple[bool, int, int, int, int]], blocks: int, in_flight: int, policy: PrefillPolicy
) -> None:
    """Budgets hold, every output is as it should be whatever is evicted and recomputed, and nothing is left."""
    node = bench(blocks=blocks, in_flight=in_flight, policy=policy)
    made, refused = [], 0
    for i, (comes, prompt, seed, n, delay) in enumerate(workload):
        for _ in range(delay):
            if node.launched:
                node.finish_step()
        # A choice that ends with its first token would not have been handed over.
        ends_at_once = seed % 23 == 0 or (seed + 7) % 23 == 0
        request = make_request(f"r{i}", prompt, seed=seed + ends_at_once, n=n, max_tokens=20, arrival=node.now)
        if not comes:
            node.submit(request)
        else:
            node.receive(offer(request), "prefill-0")
            if node.sent[-1] == ("prefill-0", Refused(request.key)):
                refused += 1
                continue
            node.admit(request)
        made.append((request, comes))
    run_out(node)
    if policy is PrefillPolicy.SPLITFUSE:
        assert all(sum(chunk.num_tokens for chunk in step.chunks) <= 24 for step in node.steps)
    for request, comes in made:
        for choice in request.choices:
            assert tokens_of(node, request, choice) == expected_tokens(request, choice)[comes:]
    assert node.scheduler.blocks.num_free == blocks
    assert node.worker.num_open == 0


def test_a_sequence_from_elsewhere_takes_part_in_the_next_step() -> None:
    node = bench()
    node.submit(make_request("a", 60, seed=20))
    node.admit(make_request("b", 30, seed=20))
    node.finish_step()
    assert node.named(node.launched[0][0]) == [("b", 1, True), ("a", 23, False)]
    node.finish_step()
    first = next(output for output in node.outputs() if output.request_id == "b")
    assert [name for name, _ in first.marks] == ["migration_start", "migration_end", "decode_start"]


def test_older_prompts_that_wait_here_have_memory_before_younger_offers() -> None:
    node = bench(blocks=20)
    node.submit(make_request("a", 40, seed=20))
    node.submit(make_request("b", 36, seed=20, arrival=1.0))
    node.receive(offer(replace(make_request("c", 8), arrival=2.0)), "prefill-0")
    assert node.sent[-1] == ("prefill-0", Refused(("c", 0)))
    node.receive(offer(replace(make_request("d", 8), arrival=0.5)), "prefill-0")
    assert ("prefill-0", Accepted(("d", 0))) in node.sent


def test_what_was_evicted_is_recomputed_here_whoever_computed_it_before() -> None:
    node = bench(blocks=9)
    older, younger = (
        make_request("a", 15, seed=20, max_tokens=9),
        make_request("b", 15, seed=20, max_tokens=9, arrival=1),
    )
    node.submit(older)
    node.admit(younger)
    run_out(node)
    assert node.scheduler.totals.num_preempted == 1
    assert tokens_of(node, older) == expected_tokens(older, 0)
    assert tokens_of(node, younger) == expected_tokens(younger, 0)[1:]


def test_losing_the_source_ends_what_had_not_come_yet() -> None:
    node = bench()
    node.receive(offer(make_request("a", 20)), "prefill-0")
    node.receive(InstanceGone("prefill-0"))
    assert node.scheduler.blocks.num_free == 400
    node.receive(offer(make_request("b", 20)), "prefill-0")
    assert not [message for message in node.messages(Accepted) if message.key == ("b", 0)]


def test_a_pull_that_ends_is_confirmed() -> None:
    node = bench()
    node.admit(make_request("a", 20, seed=20))
    assert node.messages(Pulled) == [Pulled(("a", 0))]
    assert not node.messages(Prefilled)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_step_that_fails_takes_what_was_taken_in_on_top_of_it_along(is_running: bool) -> None:
    """An offer's head is found in what a step under way computes: nobody goes on from what never was."""
    node = bench(caching=True)
    node.submit(make_request("a", 20, seed=20))
    request = make_request("b", 22, seed=20)
    node.receive(offer(request), "prefill-0")
    node.receive(Leased(request.key, 10.0), "prefill-0")
    assert [len(pull.dst_blocks) for pull in node.pulls] == [1], "the others are found"
    if is_running:
        node.receive(Prefilled(request.key, (token_at(request, 0, 0),)), "prefill-0")
        node.finish_pull()
    node.fail_step()
    assert Failed(("a", 0), "out of luck") in node.messages(Failed)
    if is_running:
        assert Failed(("b", 0), "out of luck") in node.messages(Failed)
    else:
        assert ("prefill-0", Refused(("b", 0))) in node.sent
        assert node.cancelled == [node.pulls[0].pull_id]
        node.finish_pull(ok=False)
    run_out(node)
    assert node.scheduler.blocks.num_free == 400
    again = make_request("c", 20, seed=20)
    node.submit(again)
    assert node.named(node.launched[0][0]) == [("c", 20, True)], "computed whole"
    run_out(node)
    assert tokens_of(node, again) == expected_tokens(again, 0)


def test_nothing_is_pulled_into_blocks_that_a_step_under_way_still_writes() -> None:
    node = bench(blocks=9, in_flight=2)
    for name, at in (("a", 0.0), ("b", 1.0)):
        node.submit(make_request(name, 15, seed=20, max_tokens=9, arrival=at))
    while node.scheduler.totals.num_preempted == 0:
        node.finish_step()
    assert ("b", 1, True) in node.named(node.launched[0][0]), "it writes a block that it has given back"
    early = offer(make_request("c", 4, seed=20, max_tokens=4, arrival=-1.0))
    node.receive(early, "prefill-0")
    assert node.sent[-1] == ("prefill-0", Refused(("c", 0)))
    node.finish_step()
    node.receive(early, "prefill-0")
    assert ("prefill-0", Accepted(("c", 0))) in node.sent


# -- together ----------------------------------------------------------------------------------------------------------


def crowd(count: int = 24) -> list[Request]:
    return [make_request(f"r{i}", prompt=8 + 7 * (i % 9), seed=20 + i, arrival=0.01 * i) for i in range(count)]


@pytest.mark.parametrize("pools", [(1, 0, 1), (1, 0, 2), (2, 1, 1)])
def test_under_load_some_prompts_stay_and_some_move(pools: tuple[int, int, int]) -> None:
    prefill, decode, mixed = pools
    router = RouterConfig(slo=SLO(ttft=0.3, tpot=0.1))
    cluster = Deployment(prefill=prefill, decode=decode, mixed=mixed, kv=KvConfig(200, 4), router=router)
    for request in crowd():
        cluster.submit(request)
    recorder = cluster.run()
    for request in crowd():
        assert recorder.tokens[request.request_id, 0] == expected_tokens(request, 0)
    computed = {name: recorder.steps(name) for name in cluster.schedulers}
    assert computed["prefill-0"]
    moved = {pull.key for name in computed for pull in recorder.pulls(name)}
    assert 0 < len(moved) < len(crowd())
    cluster.assert_clean()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=loads(0.5),
    pools=st.sampled_from([(1, 0, 1), (1, 0, 2), (2, 0, 2), (1, 1, 1)]),
    blocks=st.integers(26, 60),
    in_flight=st.sampled_from([(1, False), (2, False), (2, True)]),
    policy=st.sampled_from(PrefillPolicy),
    caching=st.booleans(),
    slo=st.sampled_from([SLO(1.0, 0.05), SLO(0.1, 0.1), SLO(0.01, 1.0)]),
    losses=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 5)), max_size=2),
    delay=st.sampled_from([0.0005, 0.02]),
)
def test_any_workload_is_served_exactly_and_leaves_nothing(
    load: Load,
    pools: tuple[int, int, int],
    blocks: int,
    in_flight: tuple[int, bool],
    policy: PrefillPolicy,
    caching: bool,
    slo: SLO,
    losses: list[tuple[float, int]],
    delay: float,
) -> None:
    """Under loss, preemption, aborts and forks, whatever the rule makes of it."""
    delays, router = Delays(message=delay), RouterConfig(slo=slo)
    cluster = serving(
        load, pools, blocks, in_flight, policy=policy, prefix_caching=caching, delays=delays, router=router
    )
    cluster.lose_some(losses, needed=[Role.MIXED])  # with one left every request can still be served
    cluster.run()
    cluster.assert_served()
