"""``distserve serve --prefix-caching``: turns of a conversation compute and move only what is new, and say the same."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.oracle import demo_model, generate

from .serving import Server

NUM_TOKENS = 20
BLOCK = 16
SYSTEM = "You are a helpful assistant. " * 8


# What a mixed instance finds in its cache, and that the text stays the same, is in test_local.py too.
ROLES = [("--prefill", "1", "--decode", "1"), pytest.param(("--mixed", "1"), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=ROLES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (*request.param, "--prefix-caching", "--kv-tokens", "4096")
    server = Server(*flags, log=tmp_path_factory.mktemp("prefixes") / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


def metrics(server: Server) -> dict[str, float]:
    """Totals of the cluster, by name and pool, as the instances last reported them."""
    with server.open("/metrics") as response:
        text = response.read().decode()
    found = re.findall(r'^distserve:(\w+)_total\{instance="[^"]*",pool="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {f"{name} {pool}": float(value) for name, pool, value in found}


def grown(server: Server, before: dict[str, float], least: dict[str, float]) -> dict[str, float]:
    """By how much totals are above ``before``, once reports have come that show at least so much."""
    deadline = time.monotonic() + 20
    while True:
        growth = {name: value - before.get(name, 0.0) for name, value in metrics(server).items()}
        if all(growth.get(name, 0.0) >= value for name, value in least.items()):
            return growth
        assert time.monotonic() < deadline, growth
        time.sleep(0.1)


def chat(server: Server, messages: list[dict[str, str]]) -> tuple[list[int], list[int], str, dict[str, Any]]:
    """(prompt tokens, tokens, text, usage) of one greedy answer."""
    body = {
        "messages": messages,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, answer = server.call("/v1/chat/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return answer["prompt_token_ids"], choice["token_ids"], choice["message"]["content"], answer["usage"]


def test_turns_of_a_conversation(server: Server) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    before, lengths, cached = metrics(server), [], []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}: what is new?"})
        prompt, tokens, text, usage = chat(server, messages)
        assert tokens == generate(demo_model(), prompt, NUM_TOKENS)
        messages.append({"role": "assistant", "content": text})
        lengths.append(len(prompt))
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    # What a turn has in common with the next: all but the answer, whose text need not be its tokens again.
    for turn in (1, 2):
        assert cached[turn] >= (lengths[turn - 1] - BLOCK) // BLOCK * BLOCK
    (first,) = server.call("/health")[1]["pools"].keys() - {"decode"}
    least = {f"prefix_cache_queries {first}": sum(lengths)} | (
        {"kv_migrations decode": 3} if first == "prefill" else {}
    )
    growth = grown(server, before, least)
    assert growth[f"prefix_cache_queries {first}"] == sum(lengths)
    assert growth[f"prefix_cache_hits {first}"] == sum(cached)
    computed = sum(lengths) - sum(cached)
    assert computed < 0.6 * sum(lengths)
    if first == "prefill":
        pulled = sum(lengths) - growth["prefix_cache_hits decode"]
        assert growth["kv_migrations decode"] == 3
        # Blocks, the last of each prompt partly filled.
        per_token = growth["kv_migration_bytes decode"] / (pulled + 3 * BLOCK)
        assert 0.5 * token_bytes() < per_token <= token_bytes()


def token_bytes() -> int:
    """Of KV, in float32."""
    config = demo_model().config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4


def test_log_probabilities_of_a_prompt_are_computed(server: Server) -> None:
    prompt = list(range(40, 104))
    for cached in (0, 0, 48):
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        if cached == 0:
            body["prompt_logprobs"] = 0
        status, answer = server.call("/v1/completions", body)
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


def test_a_salt_keeps_prompts_apart(server: Server) -> None:
    prompt = list(range(140, 204))
    cached = []
    for salt in ("mine", "yours", "mine"):
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        cached.append(server.call("/v1/completions", body)[1]["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, 48]
