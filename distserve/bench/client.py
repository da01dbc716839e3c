"""One streamed request over HTTP, timed where its bytes arrive.

aiohttp rather than httpx: at several hundred streams on one core it needs a third of the CPU per event, and a client
that saturates measures itself. There is no limit on connections: a request never waits here for another one.
"""

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from distserve.bench.errors import TargetError
from distserve.bench.records import RequestRecord, Status
from distserve.bench.sse import DONE, SSEParser, read_event
from distserve.bench.target import Target

_IDLE_CONNECTION_SECONDS = 2.0
"""Idle connections are dropped before a server does (uvicorn: 5 s), or a request would race with its closing."""

_ERROR_CHARS = 300

CANNOT_CONNECT = "cannot connect"
"""How the error of a request begins that found no server."""

_OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
"""What keeps this process from opening a connection, whatever the server does."""


class Client:
    """Sends requests to one target; made by ``open_client``."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self.target = target
        self._session = session

    async def send(self, record: RequestRecord, body: bytes, *, started: float, limit: float) -> None:
        """Send ``body`` and fill in ``record`` until the stream ends, one way or another.

        ``started`` is the run's start and ``limit`` counts from the record's scheduled arrival; both in seconds, on
        ``time.perf_counter``. Failures end up in the record, never as an exception; cancellation too
        (Status.CANCELLED), so that whoever cancels still has the record.
        """
        record.sent = time.perf_counter() - started
        try:
            async with asyncio.timeout(max(limit - (record.sent - record.scheduled), 0.001)):
                await self._stream(record, body, started)
        except TimeoutError:
            record.status, record.error = Status.TIMEOUT, f"no end within {limit:g} s"
        except asyncio.CancelledError:
            record.status = Status.CANCELLED
        except aiohttp.ClientConnectorError as error:
            ours = error.errno in _OWN_LIMITS
            what = "the client's own limit of open files or ports" if ours else CANNOT_CONNECT
            record.status, record.error = Status.FAILED, f"{what}: {error.strerror or error}"
        except aiohttp.ClientError as error:
            record.status, record.error = Status.FAILED, f"connection lost: {error or type(error).__name__}"
        except (ValueError, OSError) as error:
            record.status, record.error = Status.FAILED, f"bad answer: {error}"[:_ERROR_CHARS]
        record.end = time.perf_counter() - started

    async def _stream(self, record: RequestRecord, body: bytes, started: float) -> None:
        now = time.perf_counter
        times, tokens = record.event_times, record.event_tokens
        parser = SSEParser()
        done = finished = exact = False
        usage: tuple[int, int] | None = None
        async with self._session.post(self.target.url, data=body) as response:
            record.http_status = response.status
            if response.status != 200:
                text = (await response.content.read(_ERROR_CHARS)).decode(errors="replace")
                shed = response.status == 429 or (response.status == 503 and "Retry-After" in response.headers)
                record.status = Status.SHED if shed else Status.FAILED
                record.error = f"HTTP {response.status}: {text.strip()}"
                return
            while chunk := await response.content.readany():
                arrived = now() - started
                for data in parser.feed(chunk):
                    if data == DONE:
                        done = True
                        continue
                    event = read_event(data)
                    if event.num_tokens:
                        times.append(arrived)
                        tokens.append(event.num_tokens)
                        exact = exact or event.has_token_ids
                    if event.usage is not None:
                        usage = event.usage
                    if event.error is not None:
                        record.status, record.error = Status.FAILED, event.error[:_ERROR_CHARS]
                        return
                    if event.timeline is not None:
                        record.timeline = event.timeline
                    finished = finished or event.finished
        record.num_output_tokens, record.count_source = sum(tokens), "token_ids" if exact else "events"
        if usage is not None:
            record.num_prompt_tokens, record.num_output_tokens = usage
            record.count_source = "usage"
        if not (done or finished):
            record.status, record.error = Status.FAILED, "the stream broke off before its end"
        elif not times:
            record.status, record.error = Status.FAILED, "the stream ended without a token"
        else:
            record.status = Status.OK

    async def get_json(self, path: str) -> Any:
        """GET ``path`` of the target; raises TargetError when there is no JSON to be had."""
        url = self.target.base_url + path
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                if response.status != 200:
                    raise TargetError(f"{url} answers HTTP {response.status}: is it an OpenAI-compatible server?")
                return msgspec.json.decode(await response.read())
        except aiohttp.ClientConnectorError as error:
            raise TargetError(
                f"no server at {self.target.base_url}: {error.strerror or error}. Is it running?"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(f"{url} does not answer: {error or type(error).__name__}") from error
        except ValueError as error:
            raise TargetError(f"{url} does not answer in JSON: is it an OpenAI-compatible server?") from error

    async def try_once(
        self, prompt: list[int] | str, num_output_tokens: int, limit: float, *, may_wait: bool = False
    ) -> RequestRecord:
        """Send one request now, outside any run; returns its record, raises TargetError when it is refused.

        With ``may_wait`` a busy server is no refusal: Status.SHED and Status.TIMEOUT come back as well.
        """
        record = RequestRecord(-1, 0.0, len(prompt), num_output_tokens)
        body = self.target.body(prompt, num_output_tokens)
        await self.send(record, body, started=time.perf_counter(), limit=limit)
        if record.status is Status.CANCELLED:
            raise asyncio.CancelledError
        if may_wait and record.status in (Status.SHED, Status.TIMEOUT):
            return record
        if record.status is not Status.OK:
            hint = ""
            if record.http_status in (400, 422):
                hint = " Servers that refuse unknown fields need --plain; those without token-id prompts --prompt-text."
            raise TargetError(f"{self.target.url} refuses a small trial request: {record.error}{hint}")
        return record


@contextlib.asynccontextmanager
async def open_client(target: Target, api_key: str | None) -> AsyncIterator[Client]:
    """A client whose connections close with the context."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=None, keepalive_timeout=_IDLE_CONNECTION_SECONDS)
    # The deadline is the request's own: no timeout of the session may fire before it.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield Client(target, session)
