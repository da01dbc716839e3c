"""Exactly-once delivery, one attempt in charge, stale ones sent away."""

from collections.abc import Sequence

from distserve.core.commands import Command, Conclude, Deliver, Send
from distserve.core.events import ClientGone, ClientRequest, ClientStop, Received, Timer
from distserve.core.messages import (
    Abort,
    Failed,
    HandedOver,
    Hello,
    InstanceGone,
    Message,
    Preempted,
    Rejected,
    Routed,
    Submit,
    Tokens,
)
from distserve.core.owner import Owner
from distserve.core.request import FinishReason, TokenOutput
from tests.core.harness import make_request


class Desk:
    """An owner and what it did."""

    def __init__(self, n: int = 1) -> None:
        self.owner = Owner("api-0", max_losses=2)
        self.request = make_request("a", 10, n=n)
        self.sent: list[tuple[str, Message]] = []
        self.delivered: list[TokenOutput] = []
        self.concluded: list[Conclude] = []
        self.take(self.owner.handle(0.0, ClientRequest(self.request)))

    def take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self.sent.append((command.to, command.message))
            elif isinstance(command, Deliver):
                self.delivered += command.outputs
            elif isinstance(command, Conclude):
                self.concluded.append(command)

    def receive(self, sender: str, message: Message) -> None:
        self.take(self.owner.handle(0.0, Received(sender, message)))

    def tokens(self, sender: str, *indices: int, attempt: int = 0, choice: int = 0, last: bool = False) -> None:
        outputs = tuple(
            TokenOutput("a", attempt, choice, i, 100 + i, finish_reason=FinishReason.STOP if last else None)
            for i in indices
        )
        self.receive(sender, Tokens(outputs))

    @property
    def submits(self) -> list[Submit]:
        return [message for _, message in self.sent if isinstance(message, Submit)]


def test_tokens_are_delivered_once_and_in_order_whatever_overtakes() -> None:
    desk = Desk()
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.tokens("decode-0", 1)
    desk.tokens("decode-0", 2)
    assert not desk.delivered
    desk.tokens("prefill-0", 0)
    desk.tokens("decode-0", 1)
    assert [output.index for output in desk.delivered] == [0, 1, 2]


def test_a_loss_resubmits_with_the_boundary_kept() -> None:
    desk = Desk()
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.tokens("prefill-0", 0)
    desk.receive("prefill-0", HandedOver(("a", 0), "decode-0"))
    desk.tokens("decode-0", 1)
    desk.receive("router", InstanceGone("prefill-0"))
    assert len(desk.submits) == 1, "the prefill instance was no longer in charge"
    desk.receive("router", InstanceGone("decode-0"))
    again = desk.submits[-1].request
    assert (again.attempt, again.output_token_ids, len(again.prompt_token_ids)) == (1, (100, 101), 10)
    desk.tokens("decode-0", 2)
    assert ("decode-0", Abort(("a", 0))) in desk.sent, "a stale attempt is told to stop"
    desk.tokens("decode-1", 2, attempt=1, last=True)
    assert [output.index for output in desk.delivered] == [0, 1, 2]
    assert desk.concluded == [Conclude("a")]


def test_news_of_charge_from_the_dead_starts_over() -> None:
    desk = Desk()
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.receive("router", InstanceGone("decode-0"))
    desk.receive("prefill-0", HandedOver(("a", 0), "decode-0"))
    assert [submit.request.attempt for submit in desk.submits] == [0, 1]


def test_the_routers_word_does_not_undo_a_hand_over_that_overtook_it() -> None:
    desk = Desk()
    desk.receive("prefill-0", HandedOver(("a", 0), "decode-0"))
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.receive("router", InstanceGone("prefill-0"))
    assert len(desk.submits) == 1, "the prefill instance was no longer in charge"
    desk.receive("router", InstanceGone("decode-0"))
    assert len(desk.submits) == 2


def test_choices_without_tokens_start_over_together_others_alone() -> None:
    desk = Desk(n=3)
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.tokens("prefill-0", 0, choice=1)
    desk.receive("router", InstanceGone("prefill-0"))
    assert [(submit.request.choices, submit.request.output_token_ids) for submit in desk.submits[1:]] == [
        ((0, 2), ()),
        ((1,), (100,)),
    ]


def test_losses_are_counted_for_each_choice() -> None:
    """An instance that dies takes all choices with it: that is one loss for each, not three for the request."""
    desk = Desk(n=3)
    desk.receive("router", Routed(("a", 0), "mixed-0"))
    for choice in range(3):
        desk.tokens("mixed-0", 0, choice=choice)
    desk.receive("router", InstanceGone("mixed-0"))
    again = [submit.request for submit in desk.submits[1:]]
    assert sorted(request.choices for request in again) == [(0,), (1,), (2,)]
    for request in again:
        desk.receive("router", Routed(request.key, "mixed-1"))
    desk.receive("router", InstanceGone("mixed-1"))
    assert not desk.concluded
    assert len(desk.submits) == 7
    for request in [submit.request for submit in desk.submits[4:]]:
        desk.receive("router", Routed(request.key, "mixed-2"))
    desk.receive("router", InstanceGone("mixed-2"))
    assert [done.status for done in desk.concluded] == [503]


def test_preemption_does_not_count_as_a_loss() -> None:
    desk = Desk()
    for attempt in range(5):
        desk.receive("router", Routed(("a", attempt), "decode-0"))
        desk.receive("decode-0", Preempted(("a", attempt), 0))
    assert not desk.concluded
    for attempt in range(5, 8):
        desk.receive("decode-0", Failed(("a", attempt), "step failed"))
    assert desk.concluded[0].status == 503
    assert "step failed" in desk.concluded[0].reason


def test_a_stop_string_trims_and_aborts_only_its_choice() -> None:
    desk = Desk(n=2)
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    desk.tokens("prefill-0", 0, choice=0)
    desk.tokens("prefill-0", 0, choice=1)
    desk.receive("prefill-0", HandedOver(("a", 0), "decode-0"))
    desk.tokens("decode-0", 1, 2, choice=0)
    desk.take(desk.owner.handle(0.0, ClientStop("a", 0, 2)))
    assert ("decode-0", Abort(("a", 0), 0)) in desk.sent
    assert not desk.concluded
    desk.tokens("decode-0", 3, choice=0)
    desk.tokens("decode-0", 1, choice=1, last=True)
    assert [output.choice for output in desk.delivered] == [0, 1, 0, 0, 1]
    assert len(desk.concluded) == 1


def test_a_client_that_leaves_before_routing_is_aborted_when_it_is_routed() -> None:
    desk = Desk()
    desk.take(desk.owner.handle(0.0, ClientGone("a")))
    desk.receive("router", Routed(("a", 0), "prefill-0"))
    assert desk.sent[-1] == ("prefill-0", Abort(("a", 0)))
    assert desk.owner.num_live == 0


def test_a_rejection_reaches_the_client() -> None:
    desk = Desk()
    desk.receive("router", Rejected(("a", 0), 429, "busy", retry_after=3.0))
    assert desk.concluded == [Conclude("a", 429, "busy", 3.0)]


def test_an_owner_introduces_itself_again_and_again() -> None:
    desk = Desk()
    desk.take(desk.owner.handle(0.0, Timer()))
    desk.take(desk.owner.handle(5.0, Timer()))
    assert [message for _, message in desk.sent].count(Hello()) == 2
