"""A served model, a backend that writes a given text, and a real server around both."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from distserve.api.app import create_app
from distserve.api.model import ServedModel, load_served_model
from distserve.api.settings import ApiSettings
from distserve.api.tokenizer import TextTokenizer
from distserve.core.request import Request
from distserve.demo import model_dir
from tests.api.fake_backend import FakeBackend

MODEL_DIR = model_dir()
ANSWER = "The quick brown fox – naïve, 日本 and 🦊 – jumps over the lazy dog.\nThen it sleeps."


@dataclass
class Server:
    """An app on a free port, and what is behind it."""

    url: str
    backend: FakeBackend
    model: ServedModel
    client: httpx.Client

    @property
    def tokenizer(self) -> TextTokenizer:
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def say(self, text: str) -> list[int]:
        """Have every choice answer ``text``, then end; returns its tokens."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.backend.script = script_of(tokens, self.model.eos_token_ids[0])
        return tokens

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A whole completion; 200 or the test fails."""
        response = self.post("/v1/completions", **{"prompt": "Hello", "max_tokens": 200, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **body: Any) -> dict[str, Any]:
        """A whole chat answer; 200 or the test fails."""
        response = self.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "Hello"}], **body})
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end as it should."""
        if path == "/v1/completions":
            body = {"prompt": "Hello", "max_tokens": 200, **body}
        else:
            body = {"messages": [{"role": "user", "content": "Hello"}], **body}
        response = self.post(path, **body, stream=True)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done, end = response.content.decode("utf-8").split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


def script_of(tokens: Sequence[int], eos: int | None) -> Callable[[Request, int], Sequence[int]]:
    """``tokens``, then end of sequence again and again."""
    endless = [eos if eos is not None else 0] * 5000
    return lambda _request, _choice: [*tokens, *endless]


@pytest.fixture(scope="session")
def demo_model() -> ServedModel:
    return load_served_model(MODEL_DIR, names=("demo", "alias"))


Start = Callable[..., Server]


class Host:
    """A running server, whose app each test replaces: starting one takes longer than most tests."""

    def __init__(self) -> None:
        self.app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Have the server serve ``model`` on ``backend``."""
    host = Host()
    server = uvicorn.Server(uvicorn.Config(host, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=20) as client:

                def serve(backend: FakeBackend, model: ServedModel, settings: ApiSettings = ApiSettings()) -> Server:
                    host.app = create_app(backend, model, settings)
                    return Server(url, backend, model, client)

                yield serve
        finally:
            server.should_exit = True
            thread.join()


def backend_for(model: ServedModel, text: str = ANSWER) -> FakeBackend:
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False) if tokenizer is not None else list(range(3, 40))
    return FakeBackend(script_of(tokens, model.eos_token_ids[0] if model.eos_token_ids else None))


@pytest.fixture
def server(start: Start, demo_model: ServedModel) -> Server:
    return start(backend_for(demo_model), demo_model)


@pytest.fixture
def bare_server(start: Start, demo_model: ServedModel) -> Server:
    """The same model without its tokenizer."""
    model = replace(demo_model, tokenizer=None)
    return start(backend_for(model), model)
