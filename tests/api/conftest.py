"""A served model, a backend that writes a given text, and a real server around both."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn

import distserve.demo
from distserve.api.app import create_app
from distserve.api.model import ServedModel, load_served_model
from distserve.api.settings import ApiSettings
from distserve.api.tokenizer import TextTokenizer
from distserve.core.request import Request
from tests.api.fake_backend import FakeBackend

MODEL_DIR = Path(distserve.demo.__file__).parent / "model"
ANSWER = "The quick brown fox – naïve, 日本 and 🦊 – jumps over the lazy dog.\nThen it sleeps."


@dataclass
class Server:
    """An app on a free port, and what is behind it."""

    url: str
    backend: FakeBackend
    model: ServedModel
    client: httpx.Client
    loop: asyncio.AbstractEventLoop

    @property
    def tokenizer(self) -> TextTokenizer:
        assert self.model.tokenizer is not None
        return self.model.tokenizer


def script_of(tokens: Sequence[int], eos: int | None) -> Callable[[Request, int], Sequence[int]]:
    """``tokens``, then end of sequence again and again."""
    endless = [eos if eos is not None else 0] * 5000
    return lambda _request, _choice: [*tokens, *endless]


@pytest.fixture(scope="session")
def demo_model() -> ServedModel:
    return load_served_model(MODEL_DIR, names=("demo", "alias"))


def start(backend: FakeBackend, model: ServedModel, settings: ApiSettings) -> Iterator[Server]:
    app = create_app(backend, model, settings)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", loop="asyncio", lifespan="off")
        server = uvicorn.Server(config)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listener])))
        thread.start()
        url = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, timeout=20) as client:
                while not server.started:
                    assert thread.is_alive()
                yield Server(url, backend, model, client, loop)
        finally:
            server.should_exit = True
            thread.join()
            loop.close()


def backend_for(model: ServedModel, text: str = ANSWER) -> FakeBackend:
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False) if tokenizer is not None else list(range(3, 40))
    return FakeBackend(script_of(tokens, model.eos_token_ids[0] if model.eos_token_ids else None))


@pytest.fixture
def server(demo_model: ServedModel) -> Iterator[Server]:
    yield from start(backend_for(demo_model), demo_model, ApiSettings())


@pytest.fixture
def bare_server(demo_model: ServedModel) -> Iterator[Server]:
    """The same model without its tokenizer."""
    model = replace(demo_model, tokenizer=None)
    yield from start(backend_for(model), model, ApiSettings())
