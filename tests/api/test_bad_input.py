"""Every kind of bad input gets a clear error in OpenAI's envelope, and the server then still serves."""

import asyncio
import http.client
import json
from dataclasses import replace
from typing import Any

import pytest

from distserve.api.model import ServedModel
from distserve.core.commands import Conclude
from tests.api.conftest import Server, Start, backend_for

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]
OK = {"prompt": "Hello", "max_tokens": 2}
JSON = {"content-type": "application/json"}


def assert_error(response: Any, status: int, param: str | None = None, *parts: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["param"] == param
    for part in parts:
        assert part in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else error["type"])


def assert_still_serves(server: Server) -> None:
    assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b'{"prompt": "a",}', ["not valid JSON"]),
        (b'{"prompt": "\xff\xfe"}', ["not valid JSON"]),
        (b'{"prompt": "\\ud800"}', ["not valid JSON"]),
        (b'{"prompt": "a"} x', ["not valid JSON"]),
        (b"[]", ["must be a JSON object"]),
        (b'"text"', ["must be a JSON object"]),
        (b"null", ["must be a JSON object"]),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["not valid JSON", "recursion"]),
        (b'{"zzz": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", ["not valid JSON", "recursion"]),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(server: Server, path: str, data: bytes, parts: list[str]) -> None:
    assert_error(server.client.post(path, content=data, headers=JSON), 400, None, *parts)
    assert_still_serves(server)


BAD_FIELDS: list[tuple[str, str, Any, str]] = [
    (COMPLETIONS, "prompt", None, "prompt"),
    (COMPLETIONS, "prompt", 5, "prompt"),
    (COMPLETIONS, "prompt", {}, "prompt"),
    (COMPLETIONS, "prompt", [1, "a"], "prompt[0]"),
    (COMPLETIONS, "prompt", "", "prompt"),
    (COMPLETIONS, "prompt", [], "prompt"),
    (COMPLETIONS, "prompt", [[]], "prompt"),
    (COMPLETIONS, "prompt", ["a", ""], "prompt"),
    (COMPLETIONS, "prompt", [[1], []], "prompt"),
    (COMPLETIONS, "prompt", [-1], "prompt[0]"),
    (COMPLETIONS, "prompt", [3072], "prompt"),
    (COMPLETIONS, "prompt", [2**63], "prompt[0]"),
    (COMPLETIONS, "prompt", [10**400], "prompt[0]"),
    (COMPLETIONS, "prompt", [1.5], "prompt[0]"),
    (COMPLETIONS, "prompt", [True], "prompt[0]"),
    (COMPLETIONS, "prompt", ["a"] * 1025, "prompt"),
    (COMPLETIONS, "model", "gpt-5", "model"),
    (COMPLETIONS, "model", 5, "model"),
    (COMPLETIONS, "max_tokens", "5", "max_tokens"),
    (COMPLETIONS, "max_tokens", -1, "max_tokens"),
    (COMPLETIONS, "max_tokens", 0, "max_tokens"),
    (COMPLETIONS, "max_tokens", 1.5, "max_tokens"),
    (COMPLETIONS, "max_tokens", True, "max_tokens"),
    (COMPLETIONS, "max_tokens", 10**30, "max_tokens"),
    (COMPLETIONS, "max_tokens", 5000, "max_tokens"),
    (COMPLETIONS, "temperature", -0.1, "temperature"),
    (COMPLETIONS, "temperature", 2.1, "temperature"),
    (COMPLETIONS, "temperature", "hot", "temperature"),
    (COMPLETIONS, "top_p", 0, "top_p"),
    (COMPLETIONS, "top_p", 1.01, "top_p"),
    (COMPLETIONS, "top_k", -2, "top_k"),
    (COMPLETIONS, "min_p", 1.5, "min_p"),
    (COMPLETIONS, "repetition_penalty", 0, "repetition_penalty"),
    (COMPLETIONS, "presence_penalty", -3, "presence_penalty"),
    (COMPLETIONS, "frequency_penalty", 3, "frequency_penalty"),
    (COMPLETIONS, "n", 0, "n"),
    (COMPLETIONS, "n", 10_000, "n"),
    (COMPLETIONS, "best_of", 2, "best_of"),
    (COMPLETIONS, "suffix", "end", "suffix"),
    (COMPLETIONS, "seed", 2**63, "seed"),
    (COMPLETIONS, "stop", [str(i) for i in range(1000)], "stop"),
    (COMPLETIONS, "stop", "", "stop"),
    (COMPLETIONS, "stop", ["a", ""], "stop[1]"),
    (COMPLETIONS, "stop", "x" * 2000, "stop"),
    (COMPLETIONS, "stop", [5], "stop[0]"),
    (COMPLETIONS, "stop_token_ids", [3072], "stop_token_ids"),
    (COMPLETIONS, "stop_token_ids", [-1], "stop_token_ids[0]"),
    (COMPLETIONS, "logit_bias", {"3072": 1}, "logit_bias"),
    (COMPLETIONS, "logit_bias", {"a": 1}, "logit_bias.a"),
    (COMPLETIONS, "logit_bias", {"-1": 1}, "logit_bias.-1"),
    (COMPLETIONS, "logit_bias", {"5": 101}, "logit_bias.5"),
    (COMPLETIONS, "logit_bias", [5], "logit_bias"),
    (COMPLETIONS, "logprobs", 21, "logprobs"),
    (COMPLETIONS, "logprobs", True, "logprobs"),
    (COMPLETIONS, "prompt_logprobs", -1, "prompt_logprobs"),
    (COMPLETIONS, "min_tokens", 9, "min_tokens"),
    (COMPLETIONS, "stream", "yes", "stream"),
    (COMPLETIONS, "stream_options", {"include_usage": True}, "stream_options"),
    (COMPLETIONS, "guided_json", {}, "guided_json"),
    (CHAT, "messages", [], "messages"),
    (CHAT, "messages", "Hello", "messages"),
    (CHAT, "messages", [{"role": "user"}], "messages[0].content"),
    (CHAT, "messages", [{"content": "x"}], "messages[0].role"),
    (CHAT, "messages", [{"role": "king", "content": "x"}], "messages[0].role"),
    (CHAT, "messages", [{"role": "tool", "content": "x"}], "messages"),
    (CHAT, "messages", [*USER, {"role": "user", "content": 5}], "messages[1].content"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    (CHAT, "messages", [{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    (CHAT, "tools", [{"type": "function"}], "tools"),
    (CHAT, "response_format", {"type": "json_object"}, "response_format"),
    (CHAT, "chat_template", "{{ 1 }}", "chat_template"),
    (CHAT, "chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
    (CHAT, "max_completion_tokens", 0, "max_completion_tokens"),
    (CHAT, "logprobs", 5, "logprobs"),
    (CHAT, "top_logprobs", 2, "top_logprobs"),
    (CHAT, "continue_final_message", 1, "continue_final_message"),
    ("/tokenize", "prompt", 5, "prompt"),
    ("/tokenize", "prompt", None, "prompt"),
    ("/detokenize", "tokens", [5000], "tokens"),
    ("/detokenize", "tokens", "a", "tokens"),
]


@pytest.mark.parametrize(("path", "field", "value", "param"), BAD_FIELDS)
def test_bad_fields_are_named(server: Server, path: str, field: str, value: Any, param: str) -> None:
    base: dict[str, Any] = {COMPLETIONS: OK, CHAT: {"messages": USER}}.get(path, {})
    status = 404 if (field, value) == ("model", "gpt-5") else 400
    for stream in [True, False] if path in {COMPLETIONS, CHAT} and not field.startswith("stream") else [False]:
        body = {**base, "stream": stream, field: value} if stream else {**base, field: value}
        content = json.dumps(body).encode()
        assert_error(server.client.post(path, content=content, headers=JSON), status, param)
    assert_still_serves(server)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_none(server: Server, field: str, number: str) -> None:
    data = f'{{"prompt": "a", "{field}": {number}}}'.encode()
    assert_error(server.client.post(COMPLETIONS, content=data, headers=JSON), 400, field)
    data = f'{{"prompt": "a", "logit_bias": {{"5": {number}}}}}'.encode()
    assert_error(server.client.post(COMPLETIONS, content=data, headers=JSON), 400, "logit_bias.5")
    assert_still_serves(server)


def test_a_text_of_tokens_that_the_model_lacks_is_refused(start: Start, demo_model: ServedModel) -> None:
    server = start(backend_for(demo_model), demo_model)
    unknown = max(server.tokenizer.encode("Hello", add_special_tokens=False))
    server = start(server.backend, replace(demo_model, vocab_size=unknown))
    message = f"token id {unknown} is outside the vocabulary of {unknown} tokens"
    assert_error(server.post(COMPLETIONS, **OK), 400, "prompt", message)
    assert_error(server.post(COMPLETIONS, prompt=["Hello", "Hello"]), 400, "prompt", message)
    assert_error(server.post(CHAT, messages=USER), 400, "messages", message)
    assert server.backend.submitted == []
    assert unknown in server.post("/tokenize", prompt="Hello").json()["tokens"]
    assert unknown in server.post("/tokenize", messages=USER).json()["tokens"]


def test_a_prompt_past_the_context_says_the_numbers(server: Server) -> None:
    too_long = server.post(COMPLETIONS, prompt=[5] * 2048, max_tokens=1)
    assert_error(too_long, 400, "prompt", "2048 tokens", "maximum context length")
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    both = server.post(COMPLETIONS, prompt=[5] * 2000, max_tokens=100)
    assert_error(both, 400, "max_tokens", "2048", "2100", "2000 in the prompt", "100 for the output")
    text = server.post(COMPLETIONS, prompt="x y " * 100_000)
    assert_error(text, 400, "prompt", "at least")
    chat = server.post(CHAT, messages=[{"role": "user", "content": "x y " * 5000}])
    assert_error(chat, 400, "messages", "maximum context length is 2048")
    assert_still_serves(server)


def test_just_within_the_context_is_served(server: Server) -> None:
    assert server.complete(prompt=[5] * 2047, max_tokens=1)["usage"]["total_tokens"] == 2048
    assert server.complete(prompt=[5] * 2046, max_tokens=None)["usage"]["completion_tokens"] == 2


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    response = server.client.post(COMPLETIONS, content=body, headers=JSON)
    assert_error(response, 413, None, "larger than 8388608 bytes")
    assert response.json()["error"]["code"] == "request_too_large"
    # Announced but not sent: the refusal does not wait for it.
    connection = http.client.HTTPConnection("127.0.0.1", server.client.base_url.port, timeout=5)
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    # Not announced: refused once it exceeds the limit.
    response = server.client.post(
        COMPLETIONS, content=iter([body[i : i + 100_000] for i in range(0, len(body), 100_000)]), headers=JSON
    )
    assert_error(response, 413)
    assert_still_serves(server)


def test_a_client_that_leaves_while_sending(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.client.base_url.port, timeout=5)
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "1000")
    connection.endheaders()
    connection.send(b'{"prompt')
    connection.close()
    assert_still_serves(server)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json_is_read(server: Server, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    response = server.client.post(COMPLETIONS, content=json.dumps(OK).encode(), headers=headers)
    assert_error(response, 415, None, "application/json")
    fine = {"content-type": "application/json; charset=utf-8"}
    assert server.client.post(COMPLETIONS, content=json.dumps(OK).encode(), headers=fine).status_code == 200


def test_unknown_paths_and_methods(server: Server) -> None:
    assert_error(server.client.get("/v1/nothing"), 404, None, "/v1/nothing")
    assert_error(server.client.get("/v1/models/nothing"), 404, "model", "nothing", "demo")
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        response = server.client.get(path)
        assert_error(response, 405)
        assert response.headers["allow"] == "POST"
    assert_error(server.client.delete("/v1/models"), 405)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("verdict", "status", "code"),
    [
        (Conclude("", 429, "too many requests wait", 1.2), 429, "rate_limit_exceeded"),
        (Conclude("", 503, "no decode instance is left"), 503, "service_unavailable"),
        (Conclude("", 400, "needs more KV memory than any instance has"), 400, None),
        (Conclude("", 500, "the engine failed"), 500, None),
    ],
)
def test_what_the_cluster_refuses(
    server: Server, verdict: Conclude, status: int, code: str | None, stream: bool
) -> None:
    server.backend.verdict = verdict
    response = server.post(COMPLETIONS, **OK, stream=stream)
    assert_error(response, status, None, verdict.reason)
    assert response.json()["error"]["code"] == code
    assert response.headers.get("retry-after") == ("2" if status == 429 else None)
    server.backend.verdict = None
    assert_still_serves(server)


def test_a_failure_midway_ends_the_stream_with_an_error_event(server: Server) -> None:
    server.backend.verdict, server.backend.verdict_after = Conclude("", 503, "lost too often"), 2
    *events, last = server.events(prompt=["a", "b"])
    assert [event["choices"][0]["index"] for event in events].count(0) == 2
    assert last["error"]["message"] == "lost too often"
    assert server.post(COMPLETIONS, **{**OK, "max_tokens": 9}).status_code == 503
    server.backend.verdict = None
    assert_still_serves(server)


def test_a_batch_of_which_one_fails_leaves_nothing_running(server: Server) -> None:
    submit = server.backend.submit

    def refuse_second(request: Any) -> Any:
        if request.request_id.endswith("-1"):
            server.backend.verdict = Conclude("", 429, "full", 1.0)
        else:
            server.backend.verdict = None
            server.backend.delay = 0.05
        return submit(request)

    server.backend.submit = refuse_second  # type: ignore[method-assign]
    assert_error(server.post(COMPLETIONS, prompt=["a", "b"], max_tokens=50), 429)
    assert [request_id[-2:] for request_id in server.backend.abandoned] == ["-0"]


def test_a_bug_is_an_error_too(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: Any) -> Any:
        await asyncio.sleep(0)
        raise RuntimeError("a bug")
        yield

    submit, server.backend.submit = server.backend.submit, broken  # type: ignore[method-assign]
    for stream in (True, False):
        response = server.post(COMPLETIONS, **OK, stream=stream)
        assert_error(response, 500, None, "internal server error")
        assert "a bug" not in response.text
    assert "a bug" in caplog.text
    server.backend.submit = submit  # type: ignore[method-assign]
    assert_still_serves(server)
