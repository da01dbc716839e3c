"""What the HTTP side needs of whatever serves requests, and nothing more.

A driver of the owner's state machine implements it; tests implement it with a script.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from distserve.core.commands import Conclude, Deliver
from distserve.core.messages import Status
from distserve.core.request import Request


class Backend(Protocol):
    """Serves requests. Called from one event loop; no method blocks it."""

    @property
    def owner_id(self) -> str:
        """The name instances send tokens to; goes into every request."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Deliver | Conclude]:
        """Serve ``request`` (attempt 0).

        Yields tokens in order, without gaps or repeats, then exactly one Conclude, as soon as every choice has
        ended, which is the last item.
        """
        ...

    def stop(self, request_id: str, choice: int, num_tokens: int) -> None:
        """A stop string was found: ``choice`` ends after ``num_tokens`` output tokens; further ones are discarded."""
        ...

    def abandon(self, request_id: str) -> None:
        """The client is gone: free everything held for the request. Its iterator need not end."""
        ...

    def status(self) -> Status | None:
        """The cluster as last heard of; None before the first word and when the router is silent."""
        ...
