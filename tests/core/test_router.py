"""Who prefills, who decodes, and what is turned away."""

from dataclasses import replace

from distserve.core.commands import Send
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import Event, InstanceDraining, InstanceLost, InstanceUp, Received, Timer
from distserve.core.messages import (
    Abort,
    DecodeAssigned,
    DecodeDropped,
    DecodeWanted,
    Failed,
    Hello,
    InstanceGone,
    Message,
    Prefill,
    Rejected,
    Report,
    Status,
    Submit,
)
from distserve.core.router import Router, RouterConfig
from tests.core.harness import make_request

CONFIG = SchedulerConfig(max_batch_size=4, headroom=0.0)


class Switchboard:
    """A router and what it sent last."""

    def __init__(self, *instances: str, **num_blocks: int) -> None:
        self.router = Router(RouterConfig(max_wait=10.0))
        self.now = 0.0
        for name in instances:
            role = name.split("-", maxsplit=1)[0]
            kv = KvConfig(num_blocks.get(name.replace("-", "_"), 32), 4)
            self.feed(InstanceUp(InstanceSpec(name, Role(role), kv, CONFIG)))
        self.feed(Received("api-0", Hello()))

    def feed(self, event: Event) -> list[tuple[str, Message]]:
        commands = self.router.handle(self.now, event)
        return [(c.to, c.message) for c in commands if isinstance(c, Send) and not isinstance(c.message, Status)]

    def submit(self, name: str, prompt: int) -> list[tuple[str, Message]]:
        return self.feed(Received("api-0", Submit(make_request(name, prompt))))

    def want(
        self, name: str, tokens: int, refused_by: tuple[str, ...] = (), total: int = 0
    ) -> list[tuple[str, Message]]:
        wanted = DecodeWanted((name, 0), "api-0", tokens, 1, max(tokens, total), refused_by)
        return self.feed(Received("prefill-0", wanted))

    def report(self, name: str, *, waiting: int = 0, free: int = 32, rate: float = 100.0, **more: object) -> list:
        return self.feed(Received(name, Report(name, 0, waiting, 0, free, prefill_rate=rate, **more)))


def target(sent: list[tuple[str, Message]]) -> str:
    return next(to for to, message in sent if isinstance(message, Prefill))


def test_prompts_go_to_the_shortest_predicted_wait() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    board.report("prefill-0", waiting=300, rate=1000.0)
    board.report("prefill-1", waiting=100, rate=100.0)
    assert target(board.submit("a", 10)) == "prefill-0"


def test_work_assigned_since_the_last_report_counts_until_a_report_names_it() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    assert target(board.submit("a", 20)) == "prefill-0"
    assert target(board.submit("b", 10)) == "prefill-1"
    assert target(board.submit("c", 10)) == "prefill-1"
    board.report("prefill-1", seen=(("b", 0), ("c", 0)))
    assert target(board.submit("d", 10)) == "prefill-1"


def test_decode_goes_where_memory_is_and_waits_in_order_when_there_is_none() -> None:
    board = Switchboard("prefill-0", "decode-0", "decode-1")
    board.report("decode-0", free=10)
    assert board.want("a", 60) == [("prefill-0", DecodeAssigned(("a", 0), "decode-1"))]
    assert board.want("b", 80) == []
    assert board.want("c", 4) == [], "nobody overtakes"
    answers = board.report("decode-0", free=32)
    assert answers == [
        ("prefill-0", DecodeAssigned(("b", 0), "decode-0")),
        ("prefill-0", DecodeAssigned(("c", 0), "decode-1")),
    ]


def test_who_refused_is_asked_again_only_after_it_reports() -> None:
    board = Switchboard("prefill-0", "decode-0")
    assert board.want("a", 20, refused_by=("decode-0",)) == []
    assert board.report("decode-0") == [("prefill-0", DecodeAssigned(("a", 0), "decode-0"))]


def test_a_dropped_question_gives_its_memory_back() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.want("a", 100)
    assert board.want("b", 100) == []
    assert board.feed(Received("prefill-0", DecodeDropped(("a", 0), "decode-0"))) == [
        ("prefill-0", DecodeAssigned(("b", 0), "decode-0"))
    ]


def test_a_loss_is_told_to_all_and_forgets_what_was_to_come_through_it() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    board.want("a", 100)
    told = board.feed(InstanceLost("prefill-0"))
    assert {to for to, message in told if message == InstanceGone("prefill-0")} == {"prefill-1", "decode-0", "api-0"}
    sent = board.feed(Received("prefill-1", DecodeWanted(("b", 0), "api-0", 100, 1, 100)))
    assert sent == [("prefill-1", DecodeAssigned(("b", 0), "decode-0"))]


def test_the_last_words_of_a_lost_instance_claim_nothing() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    board.feed(InstanceLost("prefill-0"))
    assert board.want("a", 100) == []
    sent = board.feed(Received("prefill-1", DecodeWanted(("b", 0), "api-0", 100, 1, 100)))
    assert sent == [("prefill-1", DecodeAssigned(("b", 0), "decode-0"))]


def test_a_loss_is_told_to_whoever_comes_later() -> None:
    """An instance may die while there is no router; the next one has never seen it, nor met the owners yet."""
    board = Switchboard()
    board.feed(InstanceLost("decode-0"))
    spec = InstanceSpec("prefill-0", Role.PREFILL, KvConfig(32, 4), CONFIG)
    assert board.feed(InstanceUp(spec)) == [("prefill-0", InstanceGone("decode-0"))]
    assert board.feed(Received("api-1", Hello())) == [("api-1", InstanceGone("decode-0"))]
    assert board.feed(Received("api-1", Hello())) == []


def test_an_instance_that_falls_silent_is_lost() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    board.now = 20.0
    for name in ("prefill-1", "decode-0"):
        board.report(name)
    board.now = 31.0
    told = board.feed(Timer())
    assert {to for to, message in told if message == InstanceGone("prefill-0")} == {
        *("prefill-0", "prefill-1", "decode-0", "api-0")
    }
    assert target(board.submit("a", 10)) == "prefill-1"


def test_a_draining_instance_gets_nothing_new() -> None:
    board = Switchboard("prefill-0", "prefill-1", "decode-0")
    board.feed(InstanceDraining("prefill-0"))
    assert target(board.submit("a", 10)) == "prefill-1"
    board.feed(InstanceDraining("decode-0"))
    ((_, refusal),) = board.submit("b", 10)
    assert isinstance(refusal, Rejected)
    assert refusal.status == 503


def test_what_was_admitted_once_waits_for_a_lost_pool_to_come_back() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.feed(InstanceLost("decode-0"))
    assert isinstance(board.submit("new", 10)[0][1], Rejected)
    again = Submit(replace(make_request("a", 10), attempt=1))
    assert board.feed(Received("api-0", again)) == []
    board.now = 20.0
    assert board.feed(Timer()) == []
    sent = board.feed(InstanceUp(InstanceSpec("decode-1", Role.DECODE, KvConfig(32, 4), CONFIG)))
    assert target(sent) == "prefill-0"
    board.feed(InstanceLost("decode-1"))
    board.feed(Received("api-0", replace(again, request=replace(again.request, attempt=2))))
    board.now = 81.0
    (refusal,) = [message for _, message in board.feed(Timer()) if isinstance(message, Rejected)]
    assert refusal.status == 503


def test_a_computed_prompt_waits_for_a_lost_decode_pool_as_long_as_others_do() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.feed(InstanceLost("decode-0"))
    assert board.want("a", 8) == []
    for now in (1.0, 60.0):
        board.now = now
        assert board.report("prefill-0") == []
    board.now = 61.0
    ended = [("api-0", Failed(("a", 0), "no decode instance is up", 503)), ("prefill-0", Abort(("a", 0)))]
    assert board.report("prefill-0") == ended
    board.now = 62.0
    assert board.feed(Timer()) == []


def test_patience_starts_anew_when_a_decode_instance_was_up_meanwhile() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.feed(InstanceLost("decode-0"))
    board.want("a", 100, refused_by=("decode-1",))
    for now in (1.0, 25.0, 50.0):
        board.now = now
        board.report("prefill-0")
    board.feed(InstanceUp(InstanceSpec("decode-1", Role.DECODE, KvConfig(32, 4), CONFIG)))
    board.now = 51.0
    board.feed(Timer())
    board.feed(InstanceLost("decode-1"))
    for now in (70.0, 95.0, 120.0, 129.0):
        board.now = now
        assert board.report("prefill-0") == []
    board.now = 130.0
    assert Failed(("a", 0), "no decode instance is up", 503) in [message for _, message in board.report("prefill-0")]


def test_decoding_goes_where_there_is_memory_for_it_to_end() -> None:
    board = Switchboard("prefill-0", "decode-0", "decode-1", decode_0=64, decode_1=16)
    board.report("decode-0", free=30)
    board.report("decode-1", free=16)
    assert board.want("a", 20) == [("prefill-0", DecodeAssigned(("a", 0), "decode-1"))], "the emptier one"
    assert board.want("b", 20, total=100) == [("prefill-0", DecodeAssigned(("b", 0), "decode-0"))]


def test_who_only_a_lost_instance_could_hold_waits_alone_and_not_for_ever() -> None:
    board = Switchboard("prefill-0", "decode-0", "decode-1", decode_0=64, decode_1=16)
    board.feed(InstanceLost("decode-0"))
    assert board.want("big", 20, total=100) == []
    assert board.want("small", 20) == [("prefill-0", DecodeAssigned(("small", 0), "decode-1"))]
    for now in (1.0, 25.0, 50.0, 60.0):
        board.now = now
        assert board.report("prefill-0") == board.report("decode-1") == []
    board.now = 61.0
    reason = "no decode instance that can hold 100 tokens is up"
    assert board.report("prefill-0") == [("api-0", Failed(("big", 0), reason, 503)), ("prefill-0", Abort(("big", 0)))]


def test_a_replacement_takes_who_waited_for_its_memory() -> None:
    board = Switchboard("prefill-0", "decode-0", "decode-1", decode_0=64, decode_1=16)
    board.feed(InstanceLost("decode-0"))
    board.want("big", 20, total=100)
    sent = board.feed(InstanceUp(InstanceSpec("decode-0.1", Role.DECODE, KvConfig(64, 4), CONFIG)))
    assert ("prefill-0", DecodeAssigned(("big", 0), "decode-0.1")) in sent


def test_what_was_admitted_once_is_not_called_the_clients_mistake() -> None:
    board = Switchboard("prefill-0", "decode-0", prefill_0=8, decode_0=64)
    (answer,) = board.submit("a", 40)
    assert isinstance(answer[1], Rejected)
    assert answer[1].status == 400
    again = replace(make_request("b", 20, max_tokens=100), attempt=1, output_token_ids=tuple(range(1, 21)))
    assert board.feed(Received("api-0", Submit(again))) == []
    board.now = 61.0
    (refusal,) = [message for _, message in board.feed(Timer()) if isinstance(message, Rejected)]
    assert refusal.status == 503
    assert "a prompt of 40 tokens exceeds" in refusal.reason


def test_without_decode_instances_mixed_ones_go_on_with_what_was_computed() -> None:
    board = Switchboard("prefill-0", "decode-0", "mixed-0")
    assert target(board.submit("a", 10)) == "prefill-0", "both being idle, nobody's decoding is disturbed"
    board.feed(InstanceLost("decode-0"))
    assert board.want("a", 10) == [("prefill-0", DecodeAssigned(("a", 0), "mixed-0"))]
    board.feed(InstanceLost("prefill-0"))
    assert target(board.submit("b", 10)) == "mixed-0"


def test_when_every_wait_is_too_long_requests_are_shed() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.report("prefill-0", waiting=1600, rate=100.0)
    ((_, refusal),) = board.submit("a", 10)
    assert refusal == Rejected(("a", 0), 429, refusal.reason, retry_after=6.0)


def test_a_request_that_was_admitted_is_not_shed_when_it_comes_again() -> None:
    board = Switchboard("prefill-0", "decode-0")
    board.report("prefill-0", waiting=1600, rate=100.0)
    again = replace(make_request("a", 10), attempt=1, output_token_ids=(7,))
    assert target(board.feed(Received("api-0", Submit(again)))) == "prefill-0"
