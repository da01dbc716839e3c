"""What happens to a machine. ``machine.handle(now, event)`` returns the commands that follow.

Times are seconds on one cluster-wide clock (drivers use the wall clock advanced by the monotonic one; simulation uses
its own).
"""

from collections.abc import Sequence
from typing import Protocol

from distserve.core.commands import Command
from distserve.core.config import InstanceSpec
from distserve.core.messages import Message
from distserve.core.records import record
from distserve.core.request import Request, TokenLogprobs


@record(frozen=True, slots=True)
class Received:
    """A message arrived from the part named ``sender``."""

    sender: str
    message: Message


NOT_FINITE = -1
"""Stands in :class:`StepDone` for a token that could not be drawn because its logits were not finite."""


@record(frozen=True, slots=True)
class StepDone:
    """A step ended. ``tokens`` holds, for each sampling chunk in order, one token per choice of its sequence, flat.

    ``logprobs`` is aligned with ``tokens`` where any was asked for. ``prompt_logprobs`` has, for each chunk that
    computed prompt log-probabilities, (seq_id, entries for the prompt positions after those already reported).
    """

    step_id: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...] = ()


@record(frozen=True, slots=True)
class UnseenStepDone:
    """A simulator's StepDone: the step ended, and nobody looks at its tokens, none of which is an end token.

    Only tokens with news are sent on: the first of an output, the last, and those that carry marks.
    """

    step_id: int


@record(frozen=True, slots=True)
class StepFailed:
    """A step raised: the engine's state is suspect, its sequences must be failed."""

    step_id: int
    reason: str


@record(frozen=True, slots=True)
class Migrated:
    """A pull ended; not ``ok`` means its destination blocks hold nothing of use."""

    pull_id: int
    ok: bool
    reason: str = ""
    num_bytes: int = 0


@record(frozen=True, slots=True)
class Timer:
    """A WakeAt came due. A driver also feeds one when it starts, before anything else."""


@record(frozen=True, slots=True)
class InstanceUp:
    """Router: an instance is ready to serve."""

    spec: InstanceSpec


@record(frozen=True, slots=True)
class InstanceLost:
    """Router: an instance died or was declared dead by supervision."""

    instance_id: str


@record(frozen=True, slots=True)
class InstanceDraining:
    """Router: send the instance nothing new."""

    instance_id: str


@record(frozen=True, slots=True)
class ClientRequest:
    """Owner: a client's validated, tokenised request (attempt 0)."""

    request: Request


@record(frozen=True, slots=True)
class ClientStop:
    """Owner: a stop string was found; the choice ends after ``num_tokens`` output tokens."""

    request_id: str
    choice: int
    num_tokens: int


@record(frozen=True, slots=True)
class ClientGone:
    """Owner: the client disconnected or no longer wants the request."""

    request_id: str


Event = (
    Received
    | StepDone
    | UnseenStepDone
    | StepFailed
    | Migrated
    | Timer
    | InstanceUp
    | InstanceLost
    | InstanceDraining
    | ClientRequest
    | ClientStop
    | ClientGone
)


class Machine(Protocol):
    """A sans-IO state machine: deterministic, so the same events give the same commands."""

    def handle(self, now: float, event: Event) -> Sequence[Command]:
        """Take one event at time ``now`` (seconds, never decreasing) and return the commands it causes, in order."""
        ...
