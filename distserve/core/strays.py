"""Messages for a role that an instance no longer has, or does not have yet, and what their senders are told.

They were sent in good faith: an offer assigned before the router knew of the change, the last words about a hand-off
that has ended. Every answer is what an instance of the right role says of an attempt it does not know or cannot take,
so nobody waits for it, and no request is lost.
"""

from distserve.core.messages import (
    Accepted,
    DecodeAssigned,
    DecodeDropped,
    Failed,
    Leased,
    Message,
    Offer,
    Prefill,
    Prefilled,
    Pulled,
    Refused,
    Renew,
    Withdrawn,
)


def answer_stray(sender: str, message: Message) -> tuple[str, Message] | None:
    """(to whom, what) is to be said; None where nobody waits for an answer."""
    match message:
        case Prefill(request):
            return request.owner_id, Failed(request.key, "the instance was changing its role")
        case DecodeAssigned(key, decode_id):
            return sender, DecodeDropped(key, decode_id)
        case Offer(request):
            return sender, Refused(request.key)
        case Accepted(key) | Renew(key):
            return sender, Withdrawn(key)
        case Leased() | Prefilled() | Withdrawn() | Refused() | Pulled():
            return None
        case _:
            raise AssertionError(f"not for an instance: {message}")
