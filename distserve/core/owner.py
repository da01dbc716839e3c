"""The owner of requests: keeps what must survive any instance, and alone decides to try again.

It holds the prompt, the sampling parameters and every token emitted so far. A choice belongs to the attempt that is
now in charge of it; whatever comes from an older one is stale: dropped, and its sender told to abort. When the
instance in charge is lost, or says it preempted or failed the attempt, the choice is resubmitted as the next attempt
with the tokens it has.

Delivery is exactly once and in order per choice: a token is delivered if and only if it has the next index of the
choice's current attempt.
"""

from dataclasses import dataclass, field, replace
from itertools import groupby

from distserve.core.commands import Command, Conclude, Deliver, Send, WakeAt
from distserve.core.events import ClientGone, ClientRequest, ClientStop, Event, Received, Timer
from distserve.core.messages import (
    Abort,
    Failed,
    HandedOver,
    Hello,
    InstanceGone,
    Message,
    Preempted,
    Rejected,
    RequestKey,
    Routed,
    Status,
    Submit,
    Tokens,
)
from distserve.core.request import Request, TokenOutput
from distserve.core.scheduler import ROUTER

MAX_LOSSES = 3
"""How often one choice's attempts may be lost or fail before its client is told, unless said otherwise."""


@dataclass(slots=True)
class Choice:
    """One choice: the tokens it has emitted, and the attempt in charge of it."""

    attempt: int = 0
    token_ids: list[int] = field(default_factory=list)
    early: dict[int, TokenOutput] = field(default_factory=dict)
    """Tokens that overtook earlier ones: a choice's first token comes from another instance than its second."""
    is_done: bool = False
    num_losses: int = 0


@dataclass(slots=True)
class Attempt:
    """``instance_id`` is in charge of ``choices`` (None: the router has not said); stale attempts are deleted."""

    request: Request
    choices: set[int]
    instance_id: str | None = None


@dataclass(slots=True)
class Live:
    """A client's request until all its choices are done."""

    request: Request
    choices: dict[int, Choice]
    attempts: dict[int, Attempt] = field(default_factory=dict)
    next_attempt: int = 0
    has_prompt_logprobs: bool = False


class Owner:
    """One per API process; a machine in the sense of :class:`distserve.core.events.Machine`.

    ``max_losses`` is how often one choice's attempts may be lost or fail before the client is told (503); preemption
    does not count.
    """

    def __init__(self, owner_id: str, *, max_losses: int = MAX_LOSSES, hello_interval: float = 5.0) -> None:
        self.owner_id = owner_id
        self.status: Status | None = None
        """The last Status the router sent."""
        self._max_losses = max_losses
        self._hello_interval = hello_interval
        self._live: dict[str, Live] = {}
        self._gone: set[str] = set()
        """Instances lost and not seen alive since: a late message may still put one in charge."""
        self._commands: list[Command] = []
        self._now = 0.0

    @property
    def num_live(self) -> int:
        """Requests not concluded."""
        return len(self._live)

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take one event; see :class:`distserve.core.events.Machine`."""
        self._now = now
        match event:
            case Received(sender, message):
                self._on_message(sender, message)
            case ClientRequest(request):
                live = Live(request, {choice: Choice() for choice in request.choices})
                self._live[request.request_id] = live
                self._submit(live, request)
            case ClientStop(request_id, choice, num_tokens):
                self._on_stop(request_id, choice, num_tokens)
            case ClientGone(request_id):
                self._abandon(request_id)
            case Timer():
                # Repeated, because a restarted router has forgotten its owners.
                self._send(ROUTER, Hello())
                self._commands.append(WakeAt(now + self._hello_interval))
            case _:
                raise AssertionError(f"not an owner's event: {event}")
        commands, self._commands = self._commands, []
        return commands

    # -- the client's side ------------------------------------------------------------------------------------------

    def _on_stop(self, request_id: str, index: int, num_tokens: int) -> None:
        live = self._live.get(request_id)
        if live is None or live.choices[index].is_done:
            return
        choice = live.choices[index]
        del choice.token_ids[num_tokens:]
        attempt = live.attempts[choice.attempt]
        if attempt.instance_id is not None:
            self._send(attempt.instance_id, Abort(self._key(live, choice.attempt), index))
        self._end_choice(live, index)

    def _abandon(self, request_id: str) -> None:
        live = self._live.pop(request_id, None)
        if live is None:
            return
        for number, attempt in live.attempts.items():
            # Not routed yet: Routed will come for an unknown key and be answered with Abort.
            if attempt.instance_id is not None:
                self._send(attempt.instance_id, Abort(self._key(live, number)))

    def _conclude(self, live: Live, status: int = 200, reason: str = "", retry_after: float = 0.0) -> None:
        self._abandon(live.request.request_id)
        self._commands.append(Conclude(live.request.request_id, status, reason, retry_after))

    def _end_choice(self, live: Live, index: int) -> None:
        choice = live.choices[index]
        choice.is_done = True
        attempt = live.attempts[choice.attempt]
        attempt.choices.discard(index)
        if not attempt.choices:
            del live.attempts[choice.attempt]
        if all(other.is_done for other in live.choices.values()):
            self._conclude(live)

    # -- attempts ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _key(live: Live, attempt: int) -> RequestKey:
        return (live.request.request_id, attempt)

    def _submit(self, live: Live, request: Request) -> None:
        live.attempts[request.attempt] = Attempt(request, set(request.choices))
        live.next_attempt = request.attempt + 1
        for index in request.choices:
            live.choices[index].attempt = request.attempt
            live.choices[index].early.clear()
        self._send(ROUTER, Submit(request))

    def _resubmit(self, live: Live, number: int, choices: set[int]) -> None:
        """Start over for these choices of an attempt: together while none has emitted, else one attempt each."""
        attempt = live.attempts[number]
        attempt.choices -= choices
        if not attempt.choices:
            del live.attempts[number]
        fresh = tuple(sorted(index for index in choices if not live.choices[index].token_ids))
        groups = [fresh] if fresh else []
        groups += [(index,) for index in sorted(choices) if live.choices[index].token_ids]
        sampling = live.request.sampling
        if live.has_prompt_logprobs:
            sampling = replace(sampling, prompt_logprobs=None)
        for group in groups:
            request = replace(
                live.request,
                attempt=live.next_attempt,
                choices=group,
                sampling=sampling,
                output_token_ids=tuple(live.choices[group[0]].token_ids),
            )
            self._submit(live, request)

    def _on_loss(self, live: Live, number: int, reason: str) -> None:
        indices = set(live.attempts[number].choices)
        choices = [live.choices[index] for index in indices]
        for choice in choices:
            choice.num_losses += 1
        num_losses = max([choice.num_losses for choice in choices])
        if num_losses > self._max_losses:
            self._conclude(live, 503, f"gave up after {num_losses} failed attempts, the last one: {reason}")
            return
        self._resubmit(live, number, indices)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message) -> None:
        match message:
            case Tokens(outputs):
                self._on_tokens(sender, outputs)
            case Routed(key, instance_id):
                live = self._find(key)
                # The instance's own word may overtake the router's, and then it is the newer one.
                if live is None or live.attempts[key[1]].instance_id is None:
                    self._on_in_charge(key, instance_id)
            case HandedOver(key, instance_id):
                self._on_in_charge(key, instance_id)
            case Rejected(key, status, reason, retry_after):
                live = self._find(key)
                if live is not None:
                    self._conclude(live, status, reason, retry_after)
            case Preempted(key, choice):
                live = self._find(key)
                if live is not None and choice in live.attempts[key[1]].choices:
                    self._resubmit(live, key[1], {choice})
            case Failed(key, reason, status):
                live = self._find(key)
                if live is not None and status is None:
                    self._on_loss(live, key[1], reason)
                elif live is not None and status is not None:
                    self._conclude(live, status, reason)
            case InstanceGone(instance_id):
                self._on_instance_gone(instance_id)
            case Status(instances):
                self.status = message
                self._gone.difference_update(spec.instance_id for spec, _ in instances)
            case _:
                raise AssertionError(f"not for an owner: {message}")

    def _find(self, key: RequestKey) -> Live | None:
        live = self._live.get(key[0])
        return live if live is not None and key[1] in live.attempts else None

    def _on_in_charge(self, key: RequestKey, instance_id: str) -> None:
        live = self._find(key)
        if live is None:
            self._send(instance_id, Abort(key))
        elif instance_id in self._gone:
            self._on_loss(live, key[1], f"{instance_id} was lost")
        else:
            live.attempts[key[1]].instance_id = instance_id

    def _on_instance_gone(self, instance_id: str) -> None:
        self._gone.add(instance_id)
        for live in list(self._live.values()):
            for number, attempt in list(live.attempts.items()):
                # The router is in charge of what it has not routed.
                in_charge = attempt.instance_id or ROUTER
                if in_charge == instance_id and live.request.request_id in self._live:
                    self._on_loss(live, number, f"{instance_id} was lost")

    def _on_tokens(self, sender: str, outputs: tuple[TokenOutput, ...]) -> None:
        for request_id, group in groupby(outputs, key=lambda output: output.request_id):
            accepted = [ready for output in group for ready in self._accept(sender, output)]
            if accepted:
                self._commands.append(Deliver(request_id, tuple(accepted)))
            for output in accepted:
                if output.finish_reason is not None:
                    self._end_choice(self._live[request_id], output.choice)

    def _accept(self, sender: str, output: TokenOutput) -> list[TokenOutput]:
        """The tokens that this one makes deliverable: none if it is stale, repeated or early."""
        key = (output.request_id, output.attempt)
        live = self._find(key)
        if live is None:
            self._send(sender, Abort(key))
            return []
        choice = live.choices[output.choice]
        if choice.is_done or choice.attempt != output.attempt:
            self._send(sender, Abort(key, output.choice))
            return []
        if output.index > len(choice.token_ids):
            choice.early[output.index] = output
            return []
        if output.index < len(choice.token_ids):
            return []
        live.attempts[output.attempt].instance_id = sender
        ready = [output]
        choice.token_ids.append(output.token_id)
        while (following := choice.early.pop(len(choice.token_ids), None)) is not None:
            ready.append(following)
            choice.token_ids.append(following.token_id)
        live.has_prompt_logprobs |= output.prompt_logprobs is not None
        return ready

    def _send(self, to: str, message: Message) -> None:
        self._commands.append(Send(to, message))
