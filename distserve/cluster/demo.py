"""``distserve demo``: one question to a freshly started cluster, the answer as it streams, and where its time went."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from distserve.bench.sse import DONE, SSEParser
from distserve.cluster.config import ServeConfig
from distserve.cluster.serve import Endpoint, serve
from distserve.core.errors import DistserveError

QUESTION = "What does str.split do?"

_PHASES = (
    ("queue", "queue_seconds", "until the prefill instance starts on the prompt"),
    ("prefill", "prefill_seconds", "the prompt is read, a first token comes out"),
    ("migration", "migration_seconds", "KV moves over, beginning while prefill runs"),
    ("decode", "decode_seconds", "all further tokens"),
    ("TTFT", "ttft_seconds", "arrival to first token"),
    ("TPOT", "tpot_seconds", "per output token after the first"),
)


def demo(config: ServeConfig, question: str, console: Console) -> None:
    """Start what ``config`` says, ask ``question``, print answer and timeline, and stop everything.

    Raises:
        DistserveError: the start failed, or the answer did.
    """

    async def ask(endpoint: Endpoint) -> None:
        console.print(f"\n{question}", style="bold", markup=False, highlight=False)
        timeline: dict[str, Any] = {}
        num_tokens = 0
        async for chunk in _stream(endpoint.url, question):
            if "error" in chunk:
                raise DistserveError(str(chunk["error"]))
            timeline = chunk.get("timeline") or timeline
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                num_tokens += len(choice.get("token_ids") or ())
                console.print(text, end="", highlight=False, markup=False, soft_wrap=True)
        console.print("\n")
        console.print(_table(timeline, num_tokens))

    serve(replace(config, port=0), console, client=ask)


async def _stream(url: str, question: str) -> AsyncIterator[dict[str, Any]]:
    body = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 96,
        "return_timeline": True,
        "return_token_ids": True,
    }
    parser = SSEParser()
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise DistserveError(f"HTTP {response.status}: {await response.text()}")
        async for data in response.content.iter_any():
            for event in parser.feed(data):
                if event != DONE:
                    yield json.loads(event)


def _table(timeline: dict[str, Any], num_tokens: int) -> Table:
    table = Table(title=f"Where the time of {num_tokens} tokens went", title_justify="left")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("what happens", style="dim")
    for name, key, meaning in _PHASES:
        seconds = timeline.get(key)
        table.add_row(name, "-" if seconds is None else f"{seconds * 1e3:.1f}", meaning)
    return table
