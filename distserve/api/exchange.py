"""One HTTP request's traffic with the backend, in a scope that leaves nothing behind.

Submits the core requests, gathers what the backend yields into one inbox, and watches the client. However the scope
is left, requests that have not concluded are abandoned.
"""

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from starlette.types import Receive

from distserve.api.backend import Backend
from distserve.core.commands import Conclude, Deliver
from distserve.core.request import Request


class ClientGoneError(Exception):
    """The client has disconnected: there is nobody to answer."""


class Exchange:
    """``async with Exchange(...) as exchange: items = await exchange.receive()`` until every request has concluded."""

    def __init__(self, backend: Backend, requests: Iterable[Request], receive: Receive) -> None:
        self._backend = backend
        self._requests = list(requests)
        self._open = {request.request_id for request in self._requests}
        self._client_receive = receive
        self._inbox: list[Deliver | Conclude] = []
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._pump(request)) for request in self._requests]
        self._tasks.append(asyncio.create_task(self._watch_client()))
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First of all, and without waiting: the memory held for the requests.
        for request_id in self._open:
            self._backend.abandon(request_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def concluded(self) -> bool:
        """Whether every request has ended and all its items were received."""
        return not self._open and not self._inbox

    async def receive(self) -> list[Deliver | Conclude]:
        """All items that have come in, in order per request; waits for one.

        Raises ClientGoneError when the client has left, and what the backend's iterator raised.
        """
        while not self._inbox and self._failure is None:
            self._wake.clear()
            await self._wake.wait()
        if self._failure is not None:
            raise self._failure
        items, self._inbox = self._inbox, []
        return items

    async def _pump(self, request: Request) -> None:
        async for item in self._backend.submit(request):
            self._inbox.append(item)
            self._wake.set()
            if type(item) is Conclude:
                self._open.discard(request.request_id)
                return
        raise RuntimeError(f"the backend dropped request {request.request_id} without concluding it")

    async def _watch_client(self) -> None:
        while (await self._client_receive())["type"] != "http.disconnect":
            pass
        raise ClientGoneError

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._wake.set()
