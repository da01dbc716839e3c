"""What /v1/chat/completions answers, whole and streamed."""

from dataclasses import replace

from distserve.api.model import SamplingDefaults, ServedModel
from tests.api.conftest import ANSWER, Server, Start, backend_for

PATH = "/v1/chat/completions"


def test_a_conversation_is_answered(server: Server) -> None:
    body = server.chat()
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = server.backend.submitted[0].prompt_token_ids
    text = server.tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == "<|begin|><|user|>\nHello<|end|>\n<|assistant|>\n"
    assert body["usage"]["prompt_tokens"] == len(prompt)


def test_a_stream_opens_with_the_role(server: Server) -> None:
    tokens = server.say(ANSWER)
    first, *events = server.events(PATH)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == ANSWER
    assert len(events) == len(tokens) + 1
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_answer_may_fill_the_context(server: Server) -> None:
    server.chat()
    request = server.backend.submitted[0]
    assert request.max_total_tokens == server.model.max_model_len


def test_the_limit_has_two_names(server: Server) -> None:
    for body in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 99}):
        assert server.chat(**body)["usage"]["completion_tokens"] == 3


def test_several_choices(server: Server) -> None:
    assert [choice["index"] for choice in server.chat(n=3, max_tokens=2)["choices"]] == [0, 1, 2]
    events = server.events(PATH, n=2, max_tokens=2)
    openings = [event["choices"][0]["index"] for event in events if "role" in event["choices"][0]["delta"]]
    assert sorted(openings) == [0, 1]


def test_text_parts_are_joined(server: Server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    server.chat(messages=[{"role": "user", "content": parts}])
    text = server.tokenizer.decode(server.backend.submitted[0].prompt_token_ids, skip_special_tokens=True)
    assert "one\ntwo" in text


def test_the_final_message_can_be_continued(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    server.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    text = server.tokenizer.decode(server.backend.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert text.endswith("<|assistant|>\nWell,")


def test_logprobs(server: Server) -> None:
    server.say("🦊")
    [choice] = server.chat(logprobs=True, top_logprobs=2, max_tokens=2)["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "🦊".encode()[:2]
    assert content[0]["token"] == "bytes:\\xf0"
    assert content[0]["logprob"] == -1.0
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.0]
    _, *events = server.events(PATH, logprobs=True, top_logprobs=2, max_tokens=2)
    assert [event["choices"][0]["logprobs"]["content"][0] for event in events] == content


def test_token_ids_on_request(server: Server) -> None:
    tokens = [*server.say("fox"), server.model.eos_token_ids[0]]
    body = server.chat(return_token_ids=True)
    assert body["choices"][0]["token_ids"] == tokens
    assert body["prompt_token_ids"] == list(server.backend.submitted[0].prompt_token_ids)
    first, *events = server.events(PATH, return_token_ids=True)
    assert first["prompt_token_ids"] == body["prompt_token_ids"]
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == tokens


def test_prompt_logprobs(server: Server) -> None:
    body = server.chat(prompt_logprobs=0, max_tokens=1)
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


def test_what_the_model_recommends_is_the_default(start: Start, demo_model: ServedModel) -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, max_tokens=7)
    model = replace(demo_model, defaults=defaults)
    other = start(backend_for(model), model)
    assert other.chat()["usage"]["completion_tokens"] == 7
    other.chat(temperature=0, max_tokens=9)
    first, second = (request.sampling for request in other.backend.submitted)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.9, 20)
    assert (second.temperature, second.top_p, second.max_tokens) == (0.0, 0.9, 9)


def test_harmless_values_of_unsupported_fields_pass(server: Server) -> None:
    server.chat(tools=[], tool_choice="none", response_format={"type": "text"}, user="me", store=False, zzz=1)
