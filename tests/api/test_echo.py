"""Tokens that come back as text: whole, and without others having to wait."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.conftest import Server

LONG = [72] * 2000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": LONG}),
        ("/v1/completions", {"prompt": LONG, "echo": True, "max_tokens": 1}),
        ("/v1/completions", {"prompt": LONG, "echo": True, "max_tokens": 1, "logprobs": 0}),
        ("/v1/completions", {"prompt": [LONG[:100]] * 20, "echo": True, "max_tokens": 1}),
    ],
)
def test_others_are_answered_while_a_long_text_is_decoded(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return function(*args, **kwargs)

        return wait

    for name in ("decode", "token_bytes"):
        monkeypatch.setattr(server.tokenizer, name, held(getattr(server.tokenizer, name)))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, path, **body)
        try:
            assert begun.wait(10)
            assert server.client.get("/version", timeout=5).status_code == 200
        finally:
            go_on.set()
        assert answer.result().status_code == 200


def test_a_long_text_comes_back_whole(server: Server) -> None:
    text = "a naïve 🦊 jumps. " * 100
    tokens = server.tokenizer.encode(text, add_special_tokens=False)
    assert 1000 < len(tokens) < 2048
    assert server.post("/detokenize", tokens=tokens).json() == {"prompt": text}
    for prompt in (tokens, text):
        for logprobs in (None, 0):
            [choice] = server.complete(prompt=prompt, echo=True, max_tokens=0, logprobs=logprobs)["choices"]
            assert choice["text"] == text
