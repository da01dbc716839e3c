"""Instances that change role under load: every request is served exactly, no block and no sequence is left."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core.commands import Command, Migrate, OpenSequence, RunStep, Send
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import InstanceUp, Received
from distserve.core.instance_machine import InstanceMachine
from distserve.core.messages import (
    Become,
    DecodeAssigned,
    DecodeDropped,
    DecodeWanted,
    Failed,
    Hello,
    InstanceGone,
    Message,
    Offer,
    Prefill,
    Prefilled,
    Refused,
    Renew,
    Report,
    RoleAnswer,
    Routed,
    Status,
    Submit,
    Withdrawn,
)
from distserve.core.router import Router
from distserve.core.scheduler import ROUTER
from simulator.model import Delays
from tests.core.any_load import PAIRS, Load, loads, serving
from tests.core.harness import Deployment, make_request

OPERATOR = "operator"


def answers(cluster: Deployment) -> list[RoleAnswer]:
    sent = [command for entry in cluster.recorder.trace for command in entry.commands if isinstance(command, Send)]
    return [send.message for send in sent if isinstance(send.message, RoleAnswer)]


def roles(cluster: Deployment) -> dict[str, Role]:
    return {name: scheduler.spec.role for name, scheduler in cluster.schedulers.items()}


def assert_numbered_on(cluster: Deployment) -> None:
    """Engine and transport never see a number twice, whatever roles an instance has had."""
    for name in cluster.machines:
        commands = [command for entry in cluster.recorder.trace if entry.part == name for command in entry.commands]
        for numbers in (
            [command.step_id for command in commands if isinstance(command, RunStep)],
            [command.seq_id for command in commands if isinstance(command, OpenSequence)],
            [command.pull_id for command in commands if isinstance(command, Migrate)],
        ):
            assert len(set(numbers)) == len(numbers), name
        steps = [command.step_id for command in commands if isinstance(command, RunStep)]
        assert steps == sorted(steps), name


def crowd(num: int, *, gap: float = 0.02, max_tokens: int = 16) -> list:
    return [
        make_request(f"r{i}", 10 + 7 * (i % 5), seed=20 + i, max_tokens=max_tokens, n=1 + i % 2, arrival=gap * i)
        for i in range(num)
    ]


@pytest.mark.parametrize(
    ("pools", "name", "role"),
    [
        ((2, 2, 0), "prefill-1", Role.DECODE),
        ((2, 2, 0), "decode-1", Role.PREFILL),
        ((2, 2, 0), "decode-0", Role.MIXED),
        ((2, 2, 0), "prefill-0", Role.MIXED),
        ((1, 1, 2), "mixed-0", Role.PREFILL),
        ((1, 1, 2), "mixed-1", Role.DECODE),
        ((1, 0, 2), "mixed-1", Role.DECODE),
        ((1, 1, 1), "prefill-0", Role.DECODE),
    ],
)
def test_an_instance_changes_under_load_and_serves_in_its_new_role(
    pools: tuple[int, int, int], name: str, role: Role
) -> None:
    prefill, decode, mixed = pools
    cluster = Deployment(prefill=prefill, decode=decode, mixed=mixed)
    requests = crowd(60)
    for request in requests:
        cluster.submit(request)
    cluster.change_role(0.3, name, role)
    cluster.run()
    assert answers(cluster) == [RoleAnswer(name, role)]
    assert roles(cluster)[name] is role
    cluster.assert_served()
    changed_at = next(
        entry.time
        for entry in cluster.recorder.trace
        for command in entry.commands
        if isinstance(command, Send)
        and isinstance(command.message, Report)
        and command.message.instance_id == name
        and command.message.role is role
    )
    # Nothing was lost or handed back: every request is one attempt.
    submitted = [e.event.message for e in cluster.recorder.trace if e.part == ROUTER and isinstance(e.event, Received)]
    assert all(message.request.attempt == 0 for message in submitted if isinstance(message, Submit))
    later = [e for e in cluster.recorder.trace if e.part == name and e.time > changed_at]
    if pools != (1, 1, 1):
        assert any(
            e.commands for e in later if isinstance(e.event, Received) and isinstance(e.event.message, Prefill | Offer)
        )


def test_an_idle_instance_changes_at_once_and_the_router_hears_of_it_first() -> None:
    cluster = Deployment(prefill=2, decode=1)
    cluster.run(until=1.0)
    cluster.change_role(1.0, "prefill-1", Role.DECODE)
    cluster.run(until=1.01)
    assert roles(cluster)["prefill-1"] is Role.DECODE
    assert cluster.schedulers["prefill-1"].becoming is None


def test_what_is_not_done_in_time_goes_on_elsewhere() -> None:
    cluster = Deployment(prefill=1, decode=2)
    requests = [make_request(f"r{i}", 12, seed=21, max_tokens=20) for i in range(6)]
    for request in requests:
        cluster.submit(request)
    cluster.change_role(0.15, "decode-0", Role.PREFILL, patience=0.02)
    cluster.run(until=0.25)
    assert roles(cluster)["decode-0"] is Role.PREFILL
    cluster.run()
    cluster.assert_served()
    again = [
        entry.event.message.request
        for entry in cluster.recorder.trace
        if entry.part == ROUTER and isinstance(entry.event, Received) and isinstance(entry.event.message, Submit)
    ]
    assert any(request.attempt > 0 and request.output_token_ids for request in again), "none was under way"


@pytest.mark.parametrize("name", ["prefill-0", "mixed-0"])
def test_prompts_that_wait_are_handed_back_too(name: str) -> None:
    cluster = Deployment(prefill=2, decode=1, mixed=1)
    requests = [make_request(f"r{i}", 60, seed=20 + i, n=1 + i % 3) for i in range(12)]
    for request in requests:
        cluster.submit(request)
    cluster.change_role(0.05, name, Role.DECODE, patience=0.0)
    cluster.run()
    assert roles(cluster)[name] is Role.DECODE
    cluster.assert_served()


@pytest.mark.parametrize(
    ("pools", "name", "role", "status", "words"),
    [
        ((1, 1, 0), "prefill-0", Role.DECODE, 409, "last prefill"),
        ((2, 1, 0), "decode-0", Role.PREFILL, 409, "last decode"),
        ((0, 0, 1), "mixed-0", Role.DECODE, 409, "last mixed"),
        ((2, 1, 0), "prefill-0", Role.PREFILL, 409, "prefill instance already"),
        ((2, 1, 0), "prefill-7", Role.DECODE, 404, "prefill-0, prefill-1, decode-0"),
    ],
)
def test_what_cannot_be_is_refused(pools: tuple[int, int, int], name: str, role: Role, status: int, words: str) -> None:
    prefill, decode, mixed = pools
    cluster = Deployment(prefill=prefill, decode=decode, mixed=mixed)
    cluster.change_role(0.5, name, role)
    cluster.submit(make_request("a", 20))
    cluster.run(until=30)
    (answer,) = answers(cluster)
    assert (answer.status, answer.instance_id, answer.role) == (status, name, role)
    assert words in answer.reason
    assert cluster.recorder.concluded["a"].status == 200


def test_one_change_at_a_time_and_the_next_when_it_is_done() -> None:
    cluster = Deployment(prefill=3, decode=1)
    requests = crowd(20)
    for request in requests:
        cluster.submit(request)
    cluster.change_role(0.1, "prefill-0", Role.DECODE)
    cluster.change_role(0.101, "prefill-0", Role.MIXED)
    cluster.run(until=10.0)
    cluster.change_role(10.0, "prefill-0", Role.MIXED)
    cluster.run()
    assert [answer.status for answer in answers(cluster)] == [202, 409, 202]
    assert "about to become a decode instance" in answers(cluster)[1].reason
    assert roles(cluster)["prefill-0"] is Role.MIXED
    assert cluster.schedulers["prefill-0"].totals.num_role_changes == 2
    cluster.assert_served()
    assert_numbered_on(cluster)


def test_prompts_computed_for_a_decode_pool_that_leaves_go_to_a_mixed_instance() -> None:
    cluster = Deployment(prefill=1, decode=1, mixed=1)
    requests = [make_request(f"r{i}", 60, seed=20 + i) for i in range(12)]
    for request in requests:
        cluster.submit(request)
    cluster.change_role(0.06, "decode-0", Role.PREFILL)
    cluster.run(until=15.0)
    assert len(cluster.recorder.concluded) == len(requests), "they need not wait for a decode instance"
    cluster.assert_served()


def test_an_instance_that_comes_back_to_a_role_counts_on() -> None:
    cluster = Deployment(prefill=2, decode=2)
    requests = [*crowd(20), *(make_request(f"later-{i}", 30, seed=20 + i, arrival=30 + 0.01 * i) for i in range(20))]
    for request in requests:
        cluster.submit(request)
    cluster.change_role(5.0, "decode-0", Role.PREFILL)
    cluster.change_role(20.0, "decode-0", Role.DECODE)
    cluster.run(until=25.0)
    num_before = len(cluster.recorder.pulls("decode-0"))
    cluster.run()
    cluster.assert_served()
    assert 0 < num_before < len(cluster.recorder.pulls("decode-0"))
    assert_numbered_on(cluster)
    sends = [c for e in cluster.recorder.trace if e.part == "decode-0" for c in e.commands if isinstance(c, Send)]
    reports = [send.message for send in sends if isinstance(send.message, Report)]
    totals = [(report.num_pulls, report.num_role_changes) for report in reports]
    assert totals == sorted(totals)
    assert totals[-1] == (len(cluster.recorder.pulls("decode-0")), 2)


def test_a_step_too_small_for_the_role_is_refused() -> None:
    cluster = Deployment(prefill=2, decode=2, config=SchedulerConfig(max_batch_tokens=4, max_batch_size=8))
    cluster.change_role(0.5, "prefill-0", Role.MIXED)
    cluster.run(until=5)
    assert "max_batch_size" in answers(cluster)[0].reason


def test_without_a_pool_any_instance_may_fill_it() -> None:
    cluster = Deployment(prefill=2, decode=0)
    cluster.change_role(0.5, "prefill-0", Role.DECODE)
    request = make_request("a", 20, arrival=2.0)
    cluster.submit(request)
    cluster.run(until=30)
    cluster.assert_served()


def test_what_memory_holds_is_still_known_in_the_new_role() -> None:
    config = SchedulerConfig(max_batch_tokens=64, max_batch_size=8, prefix_caching=True)
    cluster = Deployment(prefill=1, decode=0, mixed=2, config=config, remembers=True)
    first, second = make_request("a", 40), make_request("b", 40, arrival=5.0)
    cluster.submit(first)
    cluster.run(until=4.0)
    (used,) = [name for name in ("mixed-0", "mixed-1") if cluster.recorder.steps(name)]
    cluster.change_role(4.0, used, Role.DECODE)
    cluster.run(until=4.5)
    # The other mixed instance is told to leave: prefill-0 computes, the former mixed one decodes and has the prompt.
    other = "mixed-1" if used == "mixed-0" else "mixed-0"
    cluster.change_role(4.5, other, Role.DECODE)
    cluster.submit(second)
    cluster.run()
    assert cluster.schedulers[used].totals.num_hit_tokens > 0
    assert all(len(pull.src_blocks) < 10 for pull in cluster.recorder.pulls(used) if pull.key[0] == "b")
    cluster.assert_served()


# -- the machines one by one -------------------------------------------------------------------------------------------

SPEC = InstanceSpec("x", Role.PREFILL, KvConfig(16, 4), SchedulerConfig(max_batch_tokens=32, max_batch_size=8))


def sent(commands: list[Command]) -> list[tuple[str, Message]]:
    return [(command.to, command.message) for command in commands if isinstance(command, Send)]


def changed(role: Role) -> InstanceMachine:
    machine = InstanceMachine(replace(SPEC, role=Role.DECODE if role is Role.PREFILL else Role.PREFILL))
    ((_, report),) = sent(machine.handle(1.0, Received(ROUTER, Become(role, 30.0))))
    assert isinstance(report, Report)
    assert (report.role, report.becoming, report.num_role_changes) == (role, None, 1)
    return machine


def test_what_comes_late_for_the_former_role_is_answered() -> None:
    request = make_request("a", 8)
    decode, prefill = changed(Role.DECODE), changed(Role.PREFILL)
    for machine, sender, message, expected in (
        (decode, ROUTER, Prefill(request), (request.owner_id, Failed)),
        (decode, ROUTER, DecodeAssigned(request.key, "d"), (ROUTER, DecodeDropped)),
        (decode, "d", Renew(request.key), ("d", Withdrawn)),
        (decode, "d", Refused(request.key), None),
        (prefill, "p", Offer(request, (0, 1), 8, 0, 0), ("p", Refused)),
        (prefill, "p", Prefilled(request.key, (1,)), None),
    ):
        said = [item for item in sent(machine.handle(2.0, Received(sender, message))) if item[0] != ROUTER or expected]
        if expected is None:
            assert not said
        else:
            assert any(to == expected[0] and isinstance(what, expected[1]) for to, what in said), message
        assert machine.scheduler.is_idle


def test_a_message_for_another_role_is_a_bug_where_none_has_changed() -> None:
    with pytest.raises(AssertionError):
        InstanceMachine(SPEC).handle(0.0, Received("p", Offer(make_request("a", 8), (0, 1), 8, 0, 0)))


def test_offers_of_the_dead_are_ignored_in_a_new_role_too() -> None:
    machine = InstanceMachine(SPEC)
    machine.handle(0.0, Received(ROUTER, InstanceGone("p")))
    machine.handle(1.0, Received(ROUTER, Become(Role.DECODE, 30.0)))
    machine.handle(2.0, Received("p", Offer(make_request("a", 8), (0, 1), 8, 0, 0)))
    assert machine.scheduler.is_idle


def test_a_router_that_is_new_learns_from_reports() -> None:
    router = Router()
    prefills = [replace(SPEC, instance_id=f"prefill-{i}") for i in range(2)]
    decode = replace(SPEC, instance_id="decode-0", role=Role.DECODE)
    router.handle(0.0, Received("api-0", Hello()))
    for spec in (*prefills, decode):
        router.handle(0.0, InstanceUp(spec))
    # One is on its way to another role, one has it already.
    router.handle(0.1, Received("prefill-0", Report("prefill-0", 0, 0, 0, 16, role=Role.PREFILL, becoming=Role.DECODE)))
    for i in range(4):
        said = sent(router.handle(0.2, Received("api-0", Submit(make_request(f"r{i}", 8)))))
        assert [message.instance_id for _, message in said if isinstance(message, Routed)] == ["prefill-1"]
    commands = router.handle(0.3, Received("prefill-0", Report("prefill-0", 0, 0, 0, 16, role=Role.DECODE)))
    (status,) = [message for _, message in sent(commands) if isinstance(message, Status)]
    assert {spec.instance_id: spec.role for spec, _ in status.instances}["prefill-0"] is Role.DECODE
    router.handle(0.4, Received("decode-0", Report("decode-0", 0, 0, 8, 0, role=Role.DECODE)))
    said = sent(router.handle(0.5, Received("prefill-1", DecodeWanted(("r0", 0), "api-0", 8, 1, 8))))
    assert said == [("prefill-1", DecodeAssigned(("r0", 0), "prefill-0"))]


def test_what_was_promised_to_a_former_role_is_forgotten() -> None:
    router = Router()
    decode = replace(SPEC, instance_id="decode-0", role=Role.DECODE)
    for spec in (replace(SPEC, instance_id="prefill-0"), decode):
        router.handle(0.0, InstanceUp(spec))
    # 9 of 16 blocks, which no report will ever name: the offer was turned away.
    router.handle(0.1, Received("prefill-0", DecodeWanted(("a", 0), "api-0", 35, 1, 35)))
    for now, role in ((0.2, Role.PREFILL), (0.3, Role.DECODE)):
        router.handle(now, Received("decode-0", Report("decode-0", 0, 0, 0, 16, role=role)))
    said = sent(router.handle(0.4, Received("prefill-0", DecodeWanted(("b", 0), "api-0", 60, 1, 60))))
    assert ("prefill-0", DecodeAssigned(("b", 0), "decode-0")) in said


# -- anything ----------------------------------------------------------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.floats(0.0, 1.5),  # when
        st.integers(0, 5),  # whom
        st.sampled_from(Role),
        st.sampled_from([0.0, 0.05, 0.3, 30.0]),  # patience
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=loads(0.8),
    changes=CHANGES,
    pools=st.sampled_from([(2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 1, 1), (0, 0, 2), (1, 0, 2)]),
    blocks=st.integers(26, 60),
    in_flight=st.sampled_from([(1, False), (2, False), (2, True), (3, False)]),
    caching=st.booleans(),
    loss=st.none() | st.tuples(st.floats(0.0, 1.5), st.integers(0, 5)),
    pairs=PAIRS,
)
def test_any_changes_amid_any_load_lose_nothing_and_leave_nothing(
    load: Load,
    changes: list[tuple[float, int, Role, float]],
    pools: tuple[int, int, int],
    blocks: int,
    in_flight: tuple[int, bool],
    caching: bool,
    loss: tuple[float, int] | None,
    pairs: dict[tuple[str, str], float],
) -> None:
    cluster = serving(
        load, pools, blocks, in_flight, prefix_caching=caching, delays=Delays(pairs=pairs), remembers=caching
    )
    names = sorted(cluster.machines)
    if loss is not None:
        # Somebody has to be left who can serve: an instance that neither changes nor dies.
        spec = cluster.schedulers[names[0]].spec
        cluster.start(replace(spec, instance_id="spare", role=Role.MIXED))
    for time, index, role, patience in changes:
        cluster.change_role(time, names[index % len(names)], role, patience)
    if loss is not None:
        cluster.run(until=loss[0])
        cluster.lose(names[loss[1] % len(names)])
    cluster.run()
    cluster.assert_served()
    assert_numbered_on(cluster)
    assert len(answers(cluster)) == len(changes)
    for name, role in roles(cluster).items():
        agreed = [answer.role for answer in answers(cluster) if answer.instance_id == name and answer.status == 202]
        assert role is (agreed[-1] if agreed else Role(name.partition("-")[0] if name != "spare" else "mixed"))
        assert cluster.schedulers[name].totals.num_role_changes == len(agreed)
