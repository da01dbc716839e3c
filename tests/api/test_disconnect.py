"""A client that leaves is noticed at once, streaming or not, and its requests are abandoned."""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.api.conftest import Server


@contextmanager
def request(server: Server, **body: object) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", server.client.base_url.port, timeout=10)
    data = json.dumps({"prompt": [[5], [6]], "max_tokens": 2000, **body})
    connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def wait_until_all(names: Sequence[object], what: str) -> None:
    """Wait until both of the request's prompts are in the backend's list ``names``."""
    deadline = time.monotonic() + 10
    while len(names) < 2:
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def wait_until_abandoned(server: Server) -> None:
    wait_until_all(server.backend.abandoned, "the disconnect went unnoticed")
    assert sorted(server.backend.abandoned) == sorted(request.request_id for request in server.backend.submitted)


@pytest.mark.parametrize("stream", [True, False])
def test_while_tokens_come_in(server: Server, stream: bool) -> None:
    server.backend.delay = 0.02
    with request(server, stream=stream, ignore_eos=True) as connection:
        if stream:
            assert connection.getresponse().read(20)
        wait_until_all(server.backend.submitted, "nothing was submitted")
    wait_until_abandoned(server)
    assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_token(server: Server, stream: bool) -> None:
    server.backend.hang = True
    with request(server, stream=stream):
        wait_until_all(server.backend.submitted, "nothing was submitted")
    wait_until_abandoned(server)
    # The response ends a moment after the backend has heard of it.
    deadline = time.monotonic() + 5
    while 'distserve:requests_total{outcome="abandoned"} 1.0' not in server.client.get("/metrics").text:
        assert time.monotonic() < deadline


def test_a_client_that_stays_is_not_abandoned(server: Server) -> None:
    server.complete(n=2)
    server.events(n=2)
    assert server.backend.abandoned == []
    assert len(server.backend.concluded) == 2
