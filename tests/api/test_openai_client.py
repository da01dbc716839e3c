"""The official client works unchanged: sync, async, streaming, errors."""

from collections.abc import Iterator

import openai
import pytest

from distserve.core.commands import Conclude
from tests.api.conftest import ANSWER, Server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer._request_id == answer.id
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5


def test_chat_stream(client: openai.OpenAI) -> None:
    text, usage = "", None
    with client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            usage = chunk.usage
    assert text == ANSWER
    assert usage is not None
    assert usage.completion_tokens > 0


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], max_tokens=4, logprobs=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("b")
    assert answer.choices[0].logprobs is not None
    with client.completions.create(model="demo", prompt=[5, 6], max_tokens=200, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER


def test_extensions_pass_through(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "return_timeline": True, "min_tokens": 2}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=extra, max_tokens=3)
    assert answer.model_extra is not None
    assert answer.model_extra["timeline"]["ttft_seconds"] > 0
    assert answer.choices[0].model_extra is not None
    assert len(answer.choices[0].model_extra["token_ids"]) == 3


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "alias"]
    assert client.models.retrieve("alias").id == "alias"


def test_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=-1)
    assert bad.value.param == "max_tokens"
    server.backend.verdict = Conclude("", 429, "full", 3.0)
    with pytest.raises(openai.RateLimitError) as shed:
        client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    assert shed.value.response.headers["retry-after"] == "3"
    server.backend.verdict = Conclude("", 503, "no decode instance")
    with pytest.raises(openai.InternalServerError, match="no decode instance"):
        client.chat.completions.create(model="demo", messages=MESSAGES)
    server.backend.verdict_after = 3
    with pytest.raises(openai.APIError, match="no decode instance"):
        list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True))


async def test_async(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == ANSWER
