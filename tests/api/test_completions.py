"""What /v1/completions answers, whole and streamed."""

from typing import Any

import pytest

from tests.api.conftest import ANSWER, Server


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


def test_a_prompt_is_answered(server: Server) -> None:
    body = server.complete()
    assert body["object"] == "text_completion"
    assert body["model"] == "demo"
    assert body["choices"] == [
        {"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    num_tokens = len(server.say(ANSWER)) + 1
    prompt = server.tokenizer.encode("Hello", add_special_tokens=True)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "total_tokens": len(prompt) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert list(server.backend.submitted[0].prompt_token_ids) == prompt


def test_usage_says_what_was_not_computed(server: Server) -> None:
    server.backend.num_cached_tokens = 3
    whole = server.complete(prompt=["Hello there", "Hello again"], n=2)
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}, "once for each prompt, not for each choice"
    *_, last = server.events(stream_options={"include_usage": True}, max_tokens=5)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_a_cache_salt_goes_with_the_request(server: Server) -> None:
    server.complete(cache_salt="mine")
    server.complete()
    assert [request.cache_salt for request in server.backend.submitted] == ["mine", ""]


def test_sixteen_tokens_are_the_default(server: Server) -> None:
    body = server.post("/v1/completions", prompt="Hello").json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [([5, 6, 7], [[5, 6, 7]]), ([[5, 6], [7]], [[5, 6], [7]]), (["Hello", "a"], None), ("Hello", None)],
)
def test_prompts_come_as_text_or_tokens_alone_or_batched(server: Server, prompt: Any, token_ids: Any) -> None:
    texts = [prompt] if isinstance(prompt, str) else prompt
    expected = token_ids or [server.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    body = server.complete(prompt=prompt, max_tokens=1)
    submitted = sorted(server.backend.submitted, key=lambda request: int(request.request_id.rsplit("-", 1)[1]))
    assert [list(request.prompt_token_ids) for request in submitted] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_special_tokens_are_added_unless_refused(server: Server) -> None:
    server.complete(add_special_tokens=False, max_tokens=1)
    expected = server.tokenizer.encode("Hello", add_special_tokens=False)
    assert list(server.backend.submitted[0].prompt_token_ids) == expected


def test_a_stream_has_one_event_per_token(server: Server) -> None:
    tokens = server.say(ANSWER)
    events = server.events()
    assert len(events) == len(tokens) + 1
    assert text_of(events) == ANSWER
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * len(tokens) + ["stop"]
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in events[-1]


def test_a_burst_of_tokens_still_has_one_event_each(server: Server) -> None:
    server.backend.burst = 7
    assert len(server.events(max_tokens=40)) == 40


def test_usage_ends_the_stream_on_request(server: Server) -> None:
    *events, last = server.events(stream_options={"include_usage": True}, max_tokens=5)
    assert len(events) == 5
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5


def test_choices_of_a_batch_interleave_with_the_right_indices(server: Server) -> None:
    by_prompt = {5: server.say("first answer"), 6: server.say("second")}
    eos = server.model.eos_token_ids[0]
    server.backend.script = lambda request, choice: [
        *by_prompt[request.prompt_token_ids[0]],
        *server.tokenizer.encode(f" {choice}", add_special_tokens=False),
        *[eos] * 99,
    ]
    expected = ["first answer 0", "first answer 1", "second 0", "second 1"]
    events = server.events(prompt=[[5], [6]], n=2)
    assert [text_of(events, index) for index in range(4)] == expected
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order)
    whole = server.complete(prompt=[[5], [6]], n=2)
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert whole["usage"]["completion_tokens"] == len(events)


@pytest.mark.parametrize("stream", [True, False])
def test_token_ids_on_request(server: Server, stream: bool) -> None:
    tokens = [*server.say("fox"), server.model.eos_token_ids[0]]
    if stream:
        first, *events = server.events(prompt=[9, 8], return_token_ids=True)
        assert first["choices"][0]["prompt_token_ids"] == [9, 8]
        assert [i for event in events for i in event["choices"][0]["token_ids"]] == tokens
    else:
        [choice] = server.complete(prompt=[9, 8], return_token_ids=True)["choices"]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([9, 8], tokens)


@pytest.mark.parametrize("prompt", ["Hello 🦊", [72, 73]])
def test_echo_puts_the_prompt_in_front(server: Server, prompt: Any) -> None:
    text = prompt if isinstance(prompt, str) else server.tokenizer.decode(prompt, skip_special_tokens=True)
    assert server.complete(prompt=prompt, echo=True)["choices"][0]["text"] == text + ANSWER
    assert text_of(server.events(prompt=prompt, echo=True)) == text + ANSWER


def test_echo_with_logprobs_covers_the_prompt(server: Server) -> None:
    whole = server.complete(prompt="The fox", echo=True, logprobs=2, max_tokens=2)["choices"][0]
    logprobs = whole["logprobs"]
    num_prompt = len(server.tokenizer.encode("The fox", add_special_tokens=True))
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == num_prompt + 2
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-1.0] * (num_prompt + 1)
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]:
        assert whole["text"][offset:].startswith(token)
    events = server.events(prompt="The fox", echo=True, logprobs=2, max_tokens=2)
    joined = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert joined == logprobs["tokens"]


def test_echo_without_output_scores_a_prompt(server: Server) -> None:
    body = server.complete(prompt="The fox", echo=True, logprobs=0, max_tokens=0)
    [choice] = body["choices"]
    assert choice["text"] == "The fox"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0
    assert text_of(server.events(prompt="The fox", echo=True, max_tokens=0)) == "The fox"


def test_logprobs_hold_the_best_and_the_chosen(server: Server) -> None:
    server.say("fox")
    [choice] = server.complete(logprobs=1, max_tokens=1)["choices"]
    best = server.tokenizer.token_text(7)
    chosen = choice["logprobs"]["tokens"][0]
    assert choice["logprobs"]["top_logprobs"] == [{best: -0.5, chosen: -1.0}]
    assert choice["logprobs"]["text_offset"] == [0]
    [choice] = server.complete(logprobs=3, max_tokens=1)["choices"]
    assert choice["logprobs"]["top_logprobs"][0][server.tokenizer.token_text(8)] == -9999.0, "JSON has no infinity"


def test_prompt_logprobs_as_vllm_has_them(server: Server) -> None:
    [choice] = server.complete(prompt=[9, 10], prompt_logprobs=1, max_tokens=1)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["10"] == {"logprob": -1.0, "rank": 2, "decoded_token": server.tokenizer.token_text(10)}
    assert second["7"]["rank"] == 1


def test_stop_strings_end_across_token_borders(server: Server) -> None:
    server.say("The quick brown fox jumps")
    for include, text in ((False, "The quick b"), (True, "The quick brown f")):
        [choice] = server.complete(stop=["rown f", "jump"], include_stop_str_in_output=include)["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "rown f")
        events = server.events(stop=["rown f", "jump"], include_stop_str_in_output=include)
        assert text_of(events) == text
        assert events[-1]["choices"][0]["stop_reason"] == "rown f"
    assert len(server.backend.stopped) == 4
    for request_id, choice_index, num_tokens in server.backend.stopped:
        assert choice_index == 0
        [request] = [r for r in server.backend.submitted if r.request_id == request_id]
        emitted = server.backend.script(request, 0)[:num_tokens]
        text = server.tokenizer.decode(emitted, skip_special_tokens=True)
        assert "rown f" in text
        assert "rown f" not in server.tokenizer.decode(emitted[:-1], skip_special_tokens=True)


def test_one_stopped_choice_leaves_the_others_alone(server: Server) -> None:
    eos = server.model.eos_token_ids[0]
    texts = ["one stop more", "two goes on"]
    tokens = [server.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    server.backend.script = lambda _request, choice: [*tokens[choice], *[eos] * 99]
    choices = server.complete(n=2, stop="stop")["choices"]
    assert [choice["text"] for choice in choices] == ["one ", "two goes on"]


def test_stop_strings_wait_for_min_tokens(server: Server) -> None:
    tokens = server.say("no no no no yes")
    first = len(server.tokenizer.encode("no no", add_special_tokens=False))
    [choice] = server.complete(stop="no", min_tokens=first)["choices"]
    assert choice["text"] == "no no "
    [choice] = server.complete(stop="no", min_tokens=len(tokens) + 1)["choices"]
    assert choice["text"] == "no no no no yes"


def test_stop_tokens_show_only_on_request(server: Server) -> None:
    tokens = server.say("The fox")
    whole, shown = "The fox", server.tokenizer.decode(tokens[:-1], skip_special_tokens=True)
    options = {"stop_token_ids": [tokens[-1]]}
    [choice] = server.complete(**options)["choices"]
    assert (choice["text"], choice["stop_reason"]) == (shown, tokens[-1])
    [choice] = server.complete(**options, include_stop_str_in_output=True)["choices"]
    assert choice["text"] == whole


def test_special_tokens_are_text_on_request(server: Server) -> None:
    eos = server.model.eos_token_ids[0]
    options = {"ignore_eos": True, "max_tokens": len(server.say("fox")) + 1}
    assert server.complete(**options)["choices"][0]["text"] == "fox"
    [choice] = server.complete(**options, skip_special_tokens=False)["choices"]
    assert choice["text"] == "fox" + server.tokenizer.token_text(eos)


def test_sampling_options_reach_the_backend(server: Server) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    options |= {"presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": 11, "min_tokens": 2, "max_tokens": 9}
    server.complete(**options, ignore_eos=True, stop_token_ids=[8, 9], logit_bias={"5": -100, "6": 1.5}, logprobs=3)
    sampling = server.backend.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert sampling.ignore_eos
    assert sampling.stop_token_ids == (8, 9)
    assert dict(sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert sampling.logprobs == 3
    assert sampling.eos_token_ids == server.model.eos_token_ids


def test_options_left_open(server: Server) -> None:
    server.complete()
    server.complete(top_k=-1, temperature=0.001, seed=-1)
    first, second = (request.sampling for request in server.backend.submitted)
    assert (first.temperature, first.top_p, first.top_k, first.logprobs) == (1.0, 1.0, 0, None)
    assert (second.top_k, second.temperature, second.seed) == (0, 0.01, 2**63 - 1)
    assert 0 <= first.seed < 2**63


def test_a_model_without_tokenizer_serves_tokens(bare_server: Server) -> None:
    body = bare_server.complete(prompt=[[4, 5]], max_tokens=3, logprobs=1, echo=True)
    [choice] = body["choices"]
    assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", [3, 4, 5], [4, 5])
    assert choice["logprobs"]["tokens"] == ["token_id:4", "token_id:5", "token_id:3", "token_id:4", "token_id:5"]
    events = bare_server.events(prompt=[4, 5], max_tokens=3)
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == [3, 4, 5]
    for path, body, param in (
        ("/v1/completions", {"prompt": "Hello"}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}, "messages"),
        ("/v1/completions", {"prompt": [4], "stop": "x"}, "stop"),
        ("/tokenize", {"prompt": "Hello"}, "prompt"),
        ("/detokenize", {"tokens": [4]}, "tokens"),
    ):
        response = bare_server.post(path, **body)
        assert response.status_code == 400
        assert "no tokenizer" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == param
