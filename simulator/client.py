"""Who offers the load: :class:`distserve.core.owner.Owner` without tokens, with a timeline per request.

It sends the messages an owner sends and resubmits what is lost, preempted or failed as an owner does; tokens that say
nothing new never reach it (see :class:`distserve.core.events.UnseenStepDone`), so a request costs it a handful of
events however long its output is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from distserve.core.commands import Command, Send
from distserve.core.events import ClientRequest, Event, Received, Timer
from distserve.core.messages import (
    Abort,
    Failed,
    HandedOver,
    Hello,
    InstanceGone,
    Preempted,
    Rejected,
    RequestKey,
    RoleAnswer,
    Routed,
    Status,
    Submit,
    Tokens,
)
from distserve.core.owner import MAX_LOSSES
from distserve.core.request import Request, TokenOutput
from distserve.core.scheduler import ROUTER

CLIENT = "client"
"""The name of the one owner in a simulated run."""


@dataclass(slots=True)
class Record:
    """One request so far: ``in_charge`` holds it (the router at first); times in seconds, by name of mark."""

    request: Request
    attempt: int = 0
    in_charge: str = ROUTER
    first_token: float | None = None
    finish: float | None = None
    status: int = 0
    num_losses: int = 0
    prefill_id: str = ""
    decode_id: str = ""
    marks: dict[str, float] = field(default_factory=dict)


class Client:
    """An owner whose requests need no tokens; a machine in the sense of :class:`distserve.core.events.Machine`.

    ``progress`` holds the number of output tokens of requests that left an instance; ``on_end`` takes every record
    that is concluded.
    """

    def __init__(self, progress: dict[str, int], on_end: Callable[[Record], None]) -> None:
        self.live: dict[str, Record] = {}
        self.refusals: list[RoleAnswer] = []
        """Changes of role that the router would not have."""
        self._progress = progress
        self._on_end = on_end
        self._gone: set[str] = set()
        self._commands: list[Command] = []
        self._now = 0.0

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take one event; see :class:`distserve.core.events.Machine`."""
        self._now = now
        match event:
            case Received(sender, Tokens(outputs)):
                for output in outputs:
                    self._on_token(sender, output)
            case ClientRequest(request):
                self.live[request.request_id] = Record(request)
                self._commands.append(Send(ROUTER, Submit(request)))
            case Received(sender, message):
                self._on_message(sender, message)
            case Timer():
                self._commands.append(Send(ROUTER, Hello()))
            case _:
                raise AssertionError(f"not a client's event: {event}")
        commands, self._commands = self._commands, []
        return commands

    def _on_token(self, sender: str, output: TokenOutput) -> None:
        record = self.live.get(output.request_id)
        if record is None or record.attempt != output.attempt:
            self._commands.append(Send(sender, Abort((output.request_id, output.attempt), output.choice)))
            return
        record.in_charge = sender
        if record.first_token is None:
            record.first_token = self._now
        if output.marks:
            record.marks.update(output.marks)
        if output.finish_reason is not None:
            self._end(record, 200)

    def _end(self, record: Record, status: int) -> None:
        record.finish = self._now
        record.status = status
        request_id = record.request.request_id
        del self.live[request_id]
        self._progress.pop(request_id, None)
        self._on_end(record)

    def _on_message(self, sender: str, message: object) -> None:  # noqa: ARG002 -- who says it does not matter
        match message:
            case Routed(key, instance_id):
                record = self._find(key)
                if record is None:
                    self._commands.append(Send(instance_id, Abort(key)))
                elif record.in_charge == ROUTER:
                    record.prefill_id = instance_id
                    self._take_charge(record, instance_id)
            case HandedOver(key, instance_id):
                record = self._find(key)
                if record is None:
                    self._commands.append(Send(instance_id, Abort(key)))
                else:
                    record.decode_id = instance_id
                    self._take_charge(record, instance_id)
            case Status(instances):
                if self._gone:
                    self._gone.difference_update(spec.instance_id for spec, _ in instances)
            case Rejected(key, status):
                record = self._find(key)
                if record is not None:
                    self._end(record, status)
            case Preempted(key, _):
                record = self._find(key)
                if record is not None:
                    self._resubmit(record)
            case Failed(key, _, status):
                record = self._find(key)
                if record is not None and status is None:
                    self._lose(record)
                elif record is not None and status is not None:
                    self._end(record, status)
            case InstanceGone(instance_id):
                self._gone.add(instance_id)
                for record in [record for record in self.live.values() if record.in_charge == instance_id]:
                    self._lose(record)
            case RoleAnswer(_, _, status):
                if status != 202:
                    self.refusals.append(message)
            case _:
                raise AssertionError(f"not for a client: {message}")

    def _find(self, key: RequestKey) -> Record | None:
        record = self.live.get(key[0])
        return record if record is not None and record.attempt == key[1] else None

    def _take_charge(self, record: Record, instance_id: str) -> None:
        if instance_id in self._gone:
            self._lose(record)
        else:
            record.in_charge = instance_id

    def _lose(self, record: Record) -> None:
        record.num_losses += 1
        if record.num_losses > MAX_LOSSES:
            self._end(record, 503)
        else:
            self._resubmit(record)

    def _resubmit(self, record: Record) -> None:
        record.attempt += 1
        record.in_charge = ROUTER
        # The next attempt's KV may stay where it is computed, or the prefill instance end the request.
        record.decode_id = ""
        for mark in ("migration_start", "migration_end", "decode_start"):
            record.marks.pop(mark, None)
        num_output = self._progress.get(record.request.request_id, 0)
        request = replace(record.request, attempt=record.attempt, output_token_ids=range(num_output))
        self._commands.append(Send(ROUTER, Submit(request)))
