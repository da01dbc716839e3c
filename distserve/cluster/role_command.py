"""``distserve role``: see the roles of a running deployment's instances, and change one."""

import asyncio
import time
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from distserve.core.errors import DistserveError

_POLL = 0.2
"""Seconds between two looks at an instance that changes."""
_ANSWER_PATIENCE = 60.0
_COLUMNS = ("name", "role", "becoming", "num_waiting", "num_running", "kv_cache_usage")


class AdminError(DistserveError):
    """The server cannot be reached, or refuses."""


async def change_role(
    console: Console, url: str, api_key: str | None, name: str, role: str, patience: float | None, *, wait: bool
) -> None:
    """Have instance ``name`` change; with ``wait``, return when it has. Raises AdminError."""
    body: dict[str, Any] = {"role": role}
    if patience is not None:
        body["patience"] = patience
    began = time.monotonic()
    async with _session(api_key) as session:
        await _call(session, "POST", f"{url}/admin/instances/{quote(name, safe='')}/role", body)
        console.print(f"{name} gets no new requests until it is a {role} instance", highlight=False)
        while wait:
            found = [each for each in await _instances(session, url) if each["name"] == name]
            if not found:
                raise AdminError(f"{name} was lost before it had changed")
            if found[0]["role"] == role:
                console.print(f"{name} is a {role} instance after {time.monotonic() - began:.1f} s", highlight=False)
                return
            await asyncio.sleep(_POLL)


async def show_roles(console: Console, url: str, api_key: str | None) -> None:
    """Print every instance. Raises AdminError."""
    async with _session(api_key) as session:
        instances = await _instances(session, url)
    table = Table("instance", "role", "becoming", "waiting", "running", "KV used", box=None)
    for instance in instances:
        *texts, used = (instance[column] for column in _COLUMNS)
        table.add_row(*("" if text is None else str(text) for text in texts), f"{used:.0%}")
    console.print(table)


async def _instances(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = (await _call(session, "GET", f"{url}/admin/instances"))["instances"]
    return answer


def _session(api_key: str | None) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=_ANSWER_PATIENCE))


async def _call(
    session: aiohttp.ClientSession, method: str, url: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    try:
        async with session.request(method, url, json=body) as response:
            data = msgspec.json.decode(await response.read())
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AdminError(f"no answer from {url}: {error or type(error).__name__}. Is the server running?") from error
    except msgspec.DecodeError as error:
        raise AdminError(f"{url} does not answer in JSON: is it distserve?") from error
    if status >= 400:
        message = data.get("error", {}).get("message") if isinstance(data, dict) else None
        raise AdminError(message or f"{url} answers HTTP {status}")
    if not isinstance(data, dict):
        raise AdminError(f"{url} answers something else: is it distserve?")
    return data
