"""The giving side of a KV hand-off: one small state machine per prefilled request.

::

    WANTED    the router was asked for a decode instance
      | DecodeAssigned          -> Offer
    OFFERED   blocks offered; the decode side has not answered
      | Accepted                -> Leased
      | Refused                 -> back to WANTED, naming who refused
    LEASED    the decode side pulls; a Renew prolongs the lease
      | Pulled                  -> done: blocks may go, the decode side is in charge
      | Refused (pull failed)   -> back to WANTED, later each time, at most MAX_FAILED_PULLS times, then failed

An offer unanswered, or a lease not renewed, for ``lease`` seconds is withdrawn and the attempt fails towards
its owner, who is then the only one to try again; a decode side that had finished pulling is told by the same
message to stop. Until it is done or failed the blocks stay with the request: unpulled requests count against
prefill memory, which is the backpressure.
"""

from dataclasses import dataclass
from enum import Enum, auto

from distserve.core.sequence import Sequence

MAX_FAILED_PULLS = 3
"""Pulls of one prompt that may fail before its owner is told: more than bad luck, another prefill may do better."""
PULL_PAUSE = 1.0
"""Seconds from a prompt's second failed pull to the next one, twice as many from the third.

Another decode instance may do better at once; a connection that is lost takes a second to be made anew.
"""


class HandoffState(Enum):
    """Where a hand-off stands, see the module's picture."""

    WANTED = auto()
    OFFERED = auto()
    LEASED = auto()


@dataclass(slots=True)
class Handoff:
    """A request's hand-off; ``last_step`` is the step that completes its KV.

    ``first_tokens`` come with that step's end. ``expires`` is when an unanswered offer or a lease ends, and while
    WANTED when a pause does: then the router is asked.
    """

    seq: Sequence
    last_step: int
    num_ready_tokens: int
    state: HandoffState = HandoffState.WANTED
    decode_id: str | None = None
    refused_by: tuple[str, ...] = ()
    expires: float = float("inf")
    first_tokens: tuple[int, ...] | None = None
    finished: tuple[int, ...] = ()
    is_pulled: bool = False
    num_failed_pulls: int = 0

    def reset(self, refused_by: str | None) -> None:
        """Back to WANTED: ``refused_by`` has no room, None if the instance was lost."""
        self.state = HandoffState.WANTED
        self.decode_id = None
        self.expires = float("inf")
        if refused_by is not None and refused_by not in self.refused_by:
            self.refused_by += (refused_by,)
