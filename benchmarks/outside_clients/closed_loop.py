"""A closed-loop client in the manner of DeepSpeedExamples' benchmark of MII: threads that ask, read, and ask again.

    python benchmarks/outside_clients/closed_loop.py http://127.0.0.1:8000 --model NAME --trace FILE --clients 8

Each client is a thread. It opens a connection for every request, reads the stream in pieces of up to 8 KiB and splits
it at ``data:``, so that an event is seen when the next one begins: what it can say is when an answer was complete.
Lengths are those of a trace in Mooncake's format, in its order; prompts are random token ids. Only the standard library
is used, nothing of the server's: this is a stranger's client.
"""

import argparse
import http.client
import json
import queue
import random
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_CHUNK_BYTES = 8192
_WARM_UP = (16, 4)
"""Prompt and output tokens of the request that every client sends before the clock starts."""


@dataclass(frozen=True)
class Query:
    """One request: tokens in and out."""

    index: int
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Answer:
    """``latency`` in seconds, from before the connection to the stream's end."""

    index: int
    latency: float
    output_tokens: int


class Server:
    """Where to ask."""

    def __init__(self, url: str, model: str, vocab_size: int, timeout: float) -> None:
        self._address = urlsplit(url).netloc
        self._model = model
        self._vocab_size = vocab_size
        self._timeout = timeout

    def ask(self, query: Query) -> Answer:
        """One answer, read to its end; raises RuntimeError for any but a complete one."""
        rng = random.Random(query.index)
        body = json.dumps(
            {
                "model": self._model,
                "prompt": [rng.randrange(self._vocab_size) for _ in range(query.prompt_len)],
                "max_tokens": query.output_len,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
            }
        )
        start = time.perf_counter()
        connection = http.client.HTTPConnection(self._address, timeout=self._timeout)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {response.read(300).decode(errors='replace')}")
            reason = _read(response)
        finally:
            connection.close()
        if reason != "length":
            raise RuntimeError(f"the answer ended by {reason}, not by its length")
        return Answer(query.index, time.perf_counter() - start, query.output_len)


def _read(response: http.client.HTTPResponse) -> str | None:
    """Why the answer ended; None if its stream broke off."""
    rest, reason = b"", None
    while piece := response.read1(_CHUNK_BYTES):
        *events, rest = (rest + piece).split(b"data:")
        for event in filter(None, map(bytes.strip, events)):
            choice = json.loads(event)["choices"][0]
            reason = choice["finish_reason"] or reason
    return reason if rest.strip() == b"[DONE]" else None


def load(server: Server, queries: list[Query], num_clients: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds from when the clients were let go until the last of them was done."""
    waiting: queue.SimpleQueue[Query] = queue.SimpleQueue()
    for query in queries:
        waiting.put(query)
    answers: list[Answer] = []
    failures: list[Exception] = []
    ready = threading.Barrier(num_clients + 1)

    def client(number: int) -> None:
        try:
            server.ask(Query(-1 - number, *_WARM_UP))
            ready.wait()
            while not failures:
                answers.append(server.ask(waiting.get_nowait()))
        except queue.Empty:
            return
        except (OSError, http.client.HTTPException, RuntimeError, ValueError, KeyError) as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):
        ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a request failed: {failures[0]}")
    return answers, time.perf_counter() - start


def read_queries(path: Path, num: int) -> list[Query]:
    """The first ``num`` requests of a trace in Mooncake's format."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[:num]]
    return [Query(index, line["input_length"], line["output_length"]) for index, line in enumerate(lines)]


def main() -> int:
    """Ask, and print what was found as JSON; 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--num-requests", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds without a byte after which to give up")
    options = parser.parse_args()
    server = Server(options.url, options.model, options.vocab_size, options.timeout)
    try:
        answers, duration = load(server, read_queries(options.trace, options.num_requests), options.clients)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"duration": duration, "answers": [asdict(answer) for answer in answers]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
