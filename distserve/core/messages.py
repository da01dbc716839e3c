"""Messages between owner, router and instances: the whole protocol, one dataclass each.

Who speaks to whom; a mixed instance that takes KV in is ``decode`` here::

    owner   -> router    Hello, Submit
    operator -> router   ChangeRole, answered with RoleAnswer; operators speak through an owner's process
    router  -> owner     Routed, Rejected, Failed, InstanceGone, Status
    router  -> prefill   Prefill, DecodeAssigned, Abort
    prefill -> router    DecodeWanted, DecodeDropped, Report
    prefill -> decode    Offer, Leased, Prefilled, Withdrawn
    decode  -> prefill   Accepted, Refused, Renew, Pulled
    prefill -> owner     HandedOver
    any instance -> owner    Tokens, Preempted, Failed
    owner   -> any instance  Abort
    router  -> any instance  InstanceGone, Become
    decode, mixed -> router  Report

A message may be delayed without bound or lost with its receiver, but two parts' messages arrive in order. Every
request message carries ``key = (request_id, attempt)``; whoever does not know the key ignores the message, except
that an owner answers tokens, :class:`Routed` and :class:`HandedOver` of an unknown key with :class:`Abort`, which
makes aborting race-free without tombstones.

At any time one part is in charge of an attempt: the router until ``Routed``, then the prefill instance until
``HandedOver``, then the decode instance. Whoever is in charge when something fails either recovers itself (a prefill
instance offers its KV to another decode instance) or says ``Failed`` or ``Preempted``; if it is lost, the owner, who
alone resubmits, starts the next attempt.
"""

from collections.abc import Sequence

from distserve.core.config import InstanceSpec, Role
from distserve.core.records import record
from distserve.core.request import Request, TokenOutput

RequestKey = tuple[str, int]
"""(request_id, attempt)"""


@record(frozen=True, slots=True)
class Hello:
    """An owner is there and wants Status messages."""


@record(frozen=True, slots=True)
class Submit:
    """An owner asks for one attempt at a request."""

    request: Request


@record(frozen=True, slots=True)
class Routed:
    """The router sent the attempt to this instance, which holds it until it says otherwise."""

    key: RequestKey
    instance_id: str


@record(frozen=True, slots=True)
class HandedOver:
    """A prefill instance has released the attempt: ``decode_id`` holds it now."""

    key: RequestKey
    decode_id: str


@record(frozen=True, slots=True)
class Rejected:
    """The attempt is not admitted. ``status`` is 400, 429 or 503; ``retry_after`` in seconds goes with 429."""

    key: RequestKey
    status: int
    reason: str
    retry_after: float = 0.0


@record(frozen=True, slots=True)
class Prefill:
    """An instance is to serve this attempt: a prefill instance its prompt, a mixed one all of it."""

    request: Request


@record(frozen=True, slots=True)
class DecodeWanted:
    """A prompt's last chunk starts, or has ended: its KV needs a decode instance.

    There are ``num_tokens`` tokens of KV for ``num_choices`` choices, each of which may come to ``max_total_tokens``.
    ``refused_by`` names instances that had no room when asked before.
    """

    key: RequestKey
    owner_id: str
    num_tokens: int
    num_choices: int
    max_total_tokens: int
    refused_by: tuple[str, ...] = ()


@record(frozen=True, slots=True)
class DecodeAssigned:
    """The decode instance that the router named."""

    key: RequestKey
    decode_id: str


@record(frozen=True, slots=True)
class DecodeDropped:
    """The prefill instance needs no decode instance after all (aborted, or finished with its first token)."""

    key: RequestKey
    decode_id: str | None


@record(frozen=True, slots=True)
class Offer:
    """Prefill offers KV. Memory on the decode side is reserved on receipt or not at all.

    ``num_tokens`` tokens of KV will be in ``blocks`` (the prefill instance's block ids, in order) once its step
    ``ready_step`` is done; the first ``num_ready_tokens`` are there already.
    """

    request: Request
    blocks: Sequence[int]
    num_tokens: int
    num_ready_tokens: int
    ready_step: int


@record(frozen=True, slots=True)
class Accepted:
    """Blocks are reserved; the decode side asks for a lease, whose term it counts from the sending of this."""

    key: RequestKey


@record(frozen=True, slots=True)
class Refused:
    """No room now; nothing is reserved."""

    key: RequestKey


@record(frozen=True, slots=True)
class Leased:
    """The offered blocks stay untouched for ``term`` seconds from the receipt of Accepted or Renew."""

    key: RequestKey
    term: float


@record(frozen=True, slots=True)
class Renew:
    """The pull goes on: extend the lease."""

    key: RequestKey


@record(frozen=True, slots=True)
class Prefilled:
    """The prompt is done: ``first_tokens[i]`` was sampled for ``request.choices[i]``.

    ``finished`` choices need no decoding.
    """

    key: RequestKey
    first_tokens: tuple[int, ...]
    finished: tuple[int, ...] = ()


@record(frozen=True, slots=True)
class Withdrawn:
    """The offer is void (abort, finished with the first token, lease run out).

    Stop pulling and free the reservation.
    """

    key: RequestKey


@record(frozen=True, slots=True)
class Pulled:
    """The decode side has all KV, or wants none of it any more: the prefill side may free its blocks."""

    key: RequestKey


@record(frozen=True, slots=True)
class Tokens:
    """All tokens that one step produced for one owner."""

    outputs: tuple[TokenOutput, ...]


@record(frozen=True, slots=True)
class Preempted:
    """The choice lost its KV to older ones; its owner resubmits it with the tokens it has."""

    key: RequestKey
    choice: int


@record(frozen=True, slots=True)
class Failed:
    """The attempt cannot go on here.

    ``status`` None says that another attempt may succeed; else it is the HTTP status the client is to get.
    """

    key: RequestKey
    reason: str
    status: int | None = None


@record(frozen=True, slots=True)
class Abort:
    """Free everything held for this attempt; ``choice`` None means all its choices."""

    key: RequestKey
    choice: int | None = None


@record(frozen=True, slots=True)
class InstanceGone:
    """An instance is lost: no message will come from it, and no memory of it may be read.

    Told of itself, an instance ends: it was silent for too long and nothing of it is wanted any more.
    A new router says it of ``ROUTER``, its predecessor, to owners and prefill instances: what they had asked is lost.
    """

    instance_id: str


@record(frozen=True, slots=True)
class ChangeRole:
    """An instance is to have another role; what it has not ended after ``patience`` seconds goes on elsewhere."""

    instance_id: str
    role: Role
    patience: float


@record(frozen=True, slots=True)
class RoleAnswer:
    """Whether an instance will change to ``role``: ``status`` is 202, or 404 or 409 and the ``reason`` why not."""

    instance_id: str
    role: Role
    status: int = 202
    reason: str = ""


@record(frozen=True, slots=True)
class Become:
    """Take ``role`` once nothing is left here; hand back what is left after ``patience`` seconds."""

    role: Role
    patience: float


@record(frozen=True, slots=True)
class Report:
    """An instance's load, sent at intervals and after changes.

    ``seen`` names the attempts received (Prefill, Offer) since the report before: these figures include them.
    ``num_waiting_tokens`` are prompt tokens queued and not yet computed, ``num_launched_tokens`` those that steps under
    way compute (to within one for each prompt), ``num_free_blocks`` KV blocks free now,
    ``prefill_rate`` tokens computed per second of late in steps with prompts, ``prompt_rate`` those of prompts among
    them; ``prompt_seconds`` is by how much a prompt token lengthens a step (0: not known yet). The last step without
    prompts took ``step_seconds``. What follows are totals since the instance started: preemptions; KV pulls, their
    bytes and seconds; tokens that were looked up in the prefix cache, and those of them that were found, so that they
    were not computed (prefill, mixed) or not pulled (decode); changes of role. ``role`` is what the instance is now
    (None: as it was started), ``becoming`` what it will be once what it has is done, if anything else.
    """

    instance_id: str
    num_waiting: int
    num_waiting_tokens: int
    num_running: int
    num_free_blocks: int
    seen: tuple[RequestKey, ...] = ()
    prefill_rate: float = 0.0
    step_seconds: float = 0.0
    prompt_rate: float = 0.0
    prompt_seconds: float = 0.0
    num_preempted: int = 0
    num_pulls: int = 0
    pulled_bytes: int = 0
    pull_seconds: float = 0.0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_role_changes: int = 0
    role: Role | None = None
    becoming: Role | None = None
    num_launched_tokens: int = 0


@record(frozen=True, slots=True)
class Status:
    """The cluster as the router sees it: specification and last report of every live instance.

    ``num_local_prefills`` and ``num_remote_prefills`` are totals since the router started: prompts it sent to instances
    that decode them as well, and to prefill instances.
    """

    instances: tuple[tuple[InstanceSpec, Report], ...]
    num_local_prefills: int = 0
    num_remote_prefills: int = 0


Message = (
    Hello
    | Submit
    | Routed
    | HandedOver
    | Rejected
    | Prefill
    | DecodeWanted
    | DecodeAssigned
    | DecodeDropped
    | Offer
    | Accepted
    | Refused
    | Leased
    | Renew
    | Prefilled
    | Withdrawn
    | Pulled
    | Tokens
    | Preempted
    | Failed
    | Abort
    | InstanceGone
    | ChangeRole
    | RoleAnswer
    | Become
    | Report
    | Status
)
