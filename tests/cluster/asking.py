"""Greedy requests to a backend in this process: what comes of them, and when the instances are done with them."""

import asyncio
from collections.abc import Sequence

from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.parts import OWNER
from distserve.core.commands import Conclude
from distserve.core.config import KvConfig
from distserve.core.request import Request, SamplingParams


def greedy(name: str, prompt: Sequence[int], num_tokens: int = 24) -> Request:
    return Request(name, OWNER, tuple(prompt), SamplingParams(num_tokens, temperature=0.0, ignore_eos=True))


async def collect(backend: OwnerBackend, request: Request) -> tuple[list[int], Conclude]:
    """Its tokens, and how it ended."""
    tokens: list[int] = []
    async for item in backend.submit(request):
        if isinstance(item, Conclude):
            return tokens, item
        tokens += [output.token_id for output in item.outputs]
    raise AssertionError("a stream ends with its Conclude")


async def tokens_of(backend: OwnerBackend, request: Request) -> list[int]:
    """The tokens of a request that is served."""
    tokens, end = await collect(backend, request)
    assert end.status == 200, end.reason
    return tokens


async def until_idle(backend: OwnerBackend, kv: KvConfig) -> None:
    """Wait until every instance reports all of its blocks free; what was heard before does not count."""
    heard = backend.status()
    async with asyncio.timeout(30):
        while True:
            status = backend.status()
            reports = [report for _, report in status.instances] if status is not None and status is not heard else []
            if reports and all(r.num_free_blocks == kv.num_blocks and not r.num_running for r in reports):
                return
            await asyncio.sleep(0.02)
