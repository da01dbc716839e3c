"""The model in this process: what the endpoint answers, it answers; streams, errors, and how it ends."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from distserve import LLM, Chat, SamplingParams
from distserve.api.app import create_app
from distserve.api.model import load_served_model
from distserve.api.settings import ApiSettings
from distserve.cluster.clock import cluster_time
from distserve.cluster.local import LocalCluster
from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError, InvalidRequestError, UnavailableError
from distserve.core.request import TokenLogprobs
from distserve.demo import model_dir
from distserve.offline.outputs import CompletionOutput, RequestOutput

TEXT = "Python lists are"
IDS = [5, 60, 7, 33, 21]
QUESTION = [{"role": "user", "content": "What is a list in Python?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Prompts longer than the budget are split, and more sequences than places wait for one.
    with LLM(max_batch_tokens=32, max_batch_size=8, kv_tokens=4096, threads=1) as loaded:
        yield loaded


def kv_in_use(llm: LLM) -> float:
    found = re.search(r"^distserve:kv_cache_usage_perc\{.*\} (\S+)$", llm.metrics(), re.MULTILINE)
    assert found
    return float(found[1])


def wait_until(llm: LLM, *, used: bool) -> None:
    deadline = time.monotonic() + 10
    while (kv_in_use(llm) > 0.0) != used:
        assert time.monotonic() < deadline, f"KV memory is {'not ' * used}in use"
        time.sleep(0.02)


# -- the same outputs as over HTTP -------------------------------------------------------------------------------------

CASES: dict[str, tuple[Any, SamplingParams, dict[str, Any]]] = {
    "greedy text": (TEXT, GREEDY, {"temperature": 0, "max_tokens": 24}),
    "greedy ids": (IDS, GREEDY, {"temperature": 0, "max_tokens": 24}),
    "greedy chat": (QUESTION, GREEDY, {"temperature": 0, "max_tokens": 24}),
    "defaults": (TEXT, SamplingParams(seed=3), {"seed": 3}),
    "sampled": (
        TEXT,
        SamplingParams(seed=11, temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, max_tokens=32),
        {"seed": 11, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "max_tokens": 32},
    ),
    "penalties": (
        QUESTION,
        SamplingParams(
            seed=5,
            max_tokens=32,
            repetition_penalty=1.2,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            logit_bias={7: 2.5, 9: -100.0},
        ),
        {
            "seed": 5,
            "max_tokens": 32,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {"7": 2.5, "9": -100.0},
        },
    ),
    "several choices": (
        QUESTION,
        SamplingParams(n=2, seed=7, temperature=1.5, max_tokens=16, logprobs=2),
        {"n": 2, "seed": 7, "temperature": 1.5, "max_tokens": 16, "logprobs": True, "top_logprobs": 2},
    ),
    "log-probabilities": (
        TEXT,
        SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, prompt_logprobs=1),
        {"temperature": 0, "max_tokens": 12, "logprobs": 3, "prompt_logprobs": 1},
    ),
    "a stop string": (
        QUESTION,
        SamplingParams(temperature=0.0, max_tokens=64, stop=["never said", "language"]),
        {"temperature": 0, "max_tokens": 64, "stop": ["never said", "language"]},
    ),
    "a stop string shown": (
        QUESTION,
        SamplingParams(temperature=0.0, max_tokens=64, stop="language", include_stop_str_in_output=True),
        {"temperature": 0, "max_tokens": 64, "stop": "language", "include_stop_str_in_output": True},
    ),
    "past the end": (
        QUESTION,
        SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, min_tokens=3, skip_special_tokens=False),
        {"temperature": 0, "max_tokens": 80, "ignore_eos": True, "min_tokens": 3, "skip_special_tokens": False},
    ),
}


@asynccontextmanager
async def endpoint() -> AsyncIterator[httpx.AsyncClient]:
    """HTTP in front of a prefill and a decode instance: the other way to serve the same model."""
    async with LocalCluster(model_dir(), prefill=1, decode=1, kv=KvConfig(256)) as backend:
        app = create_app(backend, load_served_model(model_dir()), ApiSettings(), clock=cluster_time)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            yield client


async def ask(client: httpx.AsyncClient, prompt: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    is_chat = prompt is QUESTION
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body = {"messages" if is_chat else "prompt": prompt, "return_token_ids": True, **options}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return [{**answer, **choice} for choice in answer["choices"]]


def assert_same_logprobs(entries: tuple[TokenLogprobs, ...] | None, choice: dict[str, Any], *, is_chat: bool) -> None:
    expected = choice["logprobs"]
    assert (entries is None) == (expected is None)
    if entries is None or expected is None:
        return
    given = [entry["logprob"] for entry in expected["content"]] if is_chat else expected["token_logprobs"]
    assert [entry.logprob for entry in entries] == pytest.approx(given, abs=1e-4)
    if is_chat:
        tops = [[top["logprob"] for top in entry["top_logprobs"]] for entry in expected["content"]]
        for entry, top in zip(entries, tops, strict=True):
            assert [logprob for _, logprob in entry.top] == pytest.approx(top, abs=1e-4)


async def test_outputs_are_those_of_the_endpoint(llm: LLM) -> None:
    async with endpoint() as client:
        expected = {name: await ask(client, prompt, body) for name, (prompt, _, body) in CASES.items()}
    # All at once, so that prompts are split, composed and decoded beside each other.
    prompts = [prompt for prompt, _, _ in CASES.values()]
    outputs = await asyncio.to_thread(llm.generate, prompts, [params for _, params, _ in CASES.values()])
    for (name, choices), prompt, output in zip(expected.items(), prompts, outputs, strict=True):
        is_chat = prompt is QUESTION
        assert len(choices) == len(output.outputs), name
        for choice, ours in zip(choices, output.outputs, strict=True):
            text = choice["message"]["content"] if is_chat else choice["text"]
            assert ours.token_ids == tuple(choice["token_ids"]), name
            assert ours.text == text, name
            assert (ours.index, ours.finish_reason, ours.stop_reason) == (
                choice["index"],
                choice["finish_reason"],
                choice["stop_reason"],
            ), name
            assert_same_logprobs(ours.logprobs, choice, is_chat=is_chat)
            assert output.prompt_token_ids == tuple(choice["prompt_token_ids"])
    by_name = dict(zip(CASES, outputs, strict=True))
    assert by_name["greedy text"].prompt == TEXT
    assert by_name["greedy ids"].prompt is None
    assert "What is a list" in (by_name["greedy chat"].prompt or "")
    assert by_name["a stop string"].outputs[0].stop_reason == "language"
    assert by_name["a stop string"].text + "language" == by_name["a stop string shown"].text
    listed = expected["log-probabilities"][0]["prompt_logprobs"]
    output = by_name["log-probabilities"]
    assert listed[0] is None
    assert output.prompt_logprobs is not None
    for token_id, entry, known in zip(output.prompt_token_ids[1:], output.prompt_logprobs, listed[1:], strict=True):
        assert entry.logprob == pytest.approx(known[str(token_id)]["logprob"], abs=1e-4)


def test_whole_prompts_and_shared_prefixes_give_the_same(llm: LLM) -> None:
    prompts = [[50 + i % 7 for i in range(length)] for length in (5, 70, 40, 71, 90)]
    expected = llm.generate(prompts, GREEDY)
    options: dict[str, Any] = {"mixed_policy": "whole", "prefix_caching": True, "max_batch_tokens": 48}
    with LLM(kv_tokens=4096, threads=1, **options) as other:
        assert other.generate(prompts, GREEDY) == expected


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = [[5 + i, 6, 7 + 3 * i] + [9] * (i % 50) for i in range(60)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    alone = [llm.generate(prompts[i], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)) for i in (0, 31)]
    assert [only.outputs for (only,) in alone] == [outputs[0].outputs, outputs[31].outputs]


def test_one_prompt_of_each_kind_is_a_batch_of_one(llm: LLM) -> None:
    for prompt in (TEXT, IDS, QUESTION, Chat(QUESTION)):
        (output,) = llm.generate(prompt, GREEDY)
        assert output.text == output.outputs[0].text
    (plain,) = llm.generate(QUESTION, GREEDY)
    going_on = [*QUESTION, {"role": "assistant", "content": plain.text[:8]}]
    (further,) = llm.generate(
        Chat(going_on, continue_final_message=True), SamplingParams(temperature=0.0, max_tokens=4)
    )
    assert (further.prompt or "").rstrip().endswith(plain.text[:8].rstrip())
    assert llm.generate([]) == []


def test_threads_share_the_batches(llm: LLM) -> None:
    (expected,) = llm.generate(QUESTION, GREEDY)
    found: list[list[RequestOutput]] = []
    threads = [threading.Thread(target=lambda: found.append(llm.generate([QUESTION] * 3, GREEDY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected] * 3] * 3


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_streamed_or_whole_is_the_same(llm: LLM) -> None:
    # Within a running loop, as in a notebook.
    params = SamplingParams(n=2, seed=9, temperature=1.2, max_tokens=20, logprobs=1, stop=" a")
    (whole,) = llm.generate(QUESTION, params)
    texts, tokens, ends = ["", ""], [[], []], {}
    logprobs: list[list[TokenLogprobs]] = [[], []]
    async for delta in llm.stream(QUESTION, params):
        assert delta.index not in ends
        texts[delta.index] += delta.text
        if delta.token_id is not None:
            tokens[delta.index].append(delta.token_id)
        if delta.logprobs is not None:
            logprobs[delta.index].append(delta.logprobs)
        if delta.finish_reason is not None:
            ends[delta.index] = (delta.finish_reason, delta.stop_reason)
    for choice in whole.outputs:
        i = choice.index
        assert CompletionOutput(i, texts[i], tuple(tokens[i]), *ends[i]) == replace(choice, logprobs=None)
        # What a token is batched with may change its last digits.
        expected = [entry.logprob for entry in choice.logprobs or ()]
        assert [entry.logprob for entry in logprobs[i]] == pytest.approx(expected, abs=1e-4)
        assert expected


async def test_tokens_come_while_others_are_still_to_come(llm: LLM) -> None:
    loop_ran = 0

    async def count() -> None:
        nonlocal loop_ran
        while True:
            await asyncio.sleep(0)
            loop_ran += 1

    counting = asyncio.create_task(count())
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    seen = [(delta.token_id, loop_ran) async for delta in llm.stream(TEXT, params)]
    counting.cancel()
    assert len(seen) == 30
    assert len({ran for _, ran in seen}) > 10, "the caller's loop runs between tokens"


async def test_streams_run_beside_each_other(llm: LLM) -> None:
    prompts = [[20 + i, 30, 40] for i in range(10)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    async def collect(prompt: list[int]) -> tuple[int | None, ...]:
        return tuple([delta.token_id async for delta in llm.stream(prompt, params)])

    streamed = await asyncio.gather(*map(collect, prompts))
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == streamed


async def test_a_stream_that_is_left_frees_its_memory(llm: LLM) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    stream = llm.stream(TEXT, endless)
    async for _ in stream:
        break
    await asyncio.to_thread(wait_until, llm, used=True)
    await stream.aclose()
    await asyncio.to_thread(wait_until, llm, used=False)
    async for _ in llm.stream(TEXT, endless):
        break
    await asyncio.to_thread(wait_until, llm, used=False)
    task = asyncio.create_task(anext(llm.stream([3] * 900, endless)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.to_thread(wait_until, llm, used=False)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_raises_what_is_wrong(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="temperature: should be less than or equal to 2"):
        await anext(llm.stream(TEXT, SamplingParams(temperature=3.0)))
    with pytest.raises(InvalidRequestError, match="prompt_logprobs cannot be streamed"):
        await anext(llm.stream(TEXT, SamplingParams(prompt_logprobs=1)))
    no_params: Any = {"temperature": 0.0}
    with pytest.raises(InvalidRequestError, match=r"must be a distserve\.SamplingParams, not dict"):
        await anext(llm.stream(TEXT, no_params))
    no_prompt: Any = 7
    with pytest.raises(InvalidRequestError, match="prompt: should be a valid string"):
        await anext(llm.stream(no_prompt))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([TEXT, ""], None, "prompt is empty"),
        ([[]], None, "prompt is empty"),
        (7, None, "a prompt is a text, a list of token ids or a list of messages, not int"),
        ([TEXT, 7], None, "not int"),
        (b"bytes", None, "not bytes"),
        ([[5, 10**6]], None, "token id 1000000 is outside the vocabulary"),
        ([[5] * 5000], None, "maximum context length"),
        ([{"role": "wizard", "content": "x"}], None, r"messages\[0\].role: should be 'system'"),
        ([{"content": "x"}], None, r"messages\[0\].role"),
        ("so \ud800", None, "prompt: character 3 is half of a surrogate pair"),
        ([{"role": "user", "content": "\ud800"}], None, "messages: character .* is half of a surrogate pair"),
        (TEXT, SamplingParams(temperature=-1.0), "temperature: should be greater than or equal to 0"),
        (TEXT, SamplingParams(n=0), "n: should be greater than or equal to 1"),
        (TEXT, SamplingParams(max_tokens=0, temperature=0.0), "max_tokens must be at least 1"),
        (TEXT, SamplingParams(max_tokens=10**5), "maximum context length"),
        (TEXT, SamplingParams(stop=[""]), "stop"),
        (TEXT, SamplingParams(logprobs=50), "logprobs: should be less than or equal to 20"),
        (TEXT, SamplingParams(stop=5), "stop: should be a valid string or a valid list"),  # type: ignore[arg-type]
        (TEXT, SamplingParams(stop_token_ids=2), "stop_token_ids: should be a valid list"),  # type: ignore[arg-type]
        (Chat("hello"), None, "messages: should be a valid list"),  # type: ignore[arg-type]
        (Chat([*QUESTION, "b"]), None, r"messages\[1\]: should be a valid dictionary"),  # type: ignore[list-item]
        ([*QUESTION, "b"], None, r"messages\[1\]: should be a valid dictionary"),
        ([["a", "b"]], None, "one prompt is a text or token ids, not several"),
        ([TEXT, TEXT], [GREEDY], "1 sampling_params for 2 prompts"),
        (TEXT, {"temperature": 0.0}, "sampling_params must be a distserve.SamplingParams, not dict"),
        ([TEXT, TEXT], [GREEDY, {}], "must be a distserve.SamplingParams, not dict"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_computed(llm: LLM, prompts: Any, params: Any, message: str) -> None:
    before = re.findall(r"^distserve:prompt_tokens_total.*$", llm.metrics(), re.MULTILINE)
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, params)
    assert re.findall(r"^distserve:prompt_tokens_total.*$", llm.metrics(), re.MULTILINE) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype: 'int3' is wrong"),
        ({"max_batch_tokens": 8}, "smaller than a KV block of 16 tokens"),
        ({"max_batch_tokens": 32}, "no room for a token of each of the max_batch_size = 64 sequences"),
        ({"max_model_len": 10**6}, "max_model_len 1000000 is more than the model can take"),
        ({"kv_tokens": 10**12}, r"1 instance needs .* are free.* Ask for less KV by kv_tokens\."),
        ({"kv_tokens": 4096, "kv_memory": 1e6}, "kv_tokens and kv_memory both say"),
        ({"prefix_cache_tokens": 64}, "the prefix cache, which is off: set prefix_caching"),
        ({"prefix_caching": True, "prefix_cache_tokens": 8}, "a prefix cache of 8 tokens does not fit"),
        ({"mixed_policy": "both"}, "mixed_policy: 'both' is wrong, must be 'splitfuse' or 'whole'"),
        ({"model": "/no/such/model"}, "model directory /no/such/model does not exist"),
        ({"model": Path(__file__).parent}, "no config.json"),
    ],
)
def test_what_cannot_be_loaded_says_why(options: dict[str, Any], message: str) -> None:
    num_threads = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        LLM(**options)
    assert threading.active_count() == num_threads


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_closing_ends_what_is_under_way() -> None:
    num_threads = threading.active_count()
    llm = LLM(kv_tokens=4096, threads=1)
    stream = llm.stream(TEXT, SamplingParams(max_tokens=1500, ignore_eos=True))
    await anext(stream)
    await asyncio.to_thread(llm.close)
    with pytest.raises(UnavailableError, match="shut down"):
        async for _ in stream:
            pass
    llm.close()
    with pytest.raises(UnavailableError, match="closed"):
        llm.generate(TEXT)
    with pytest.raises(UnavailableError, match="closed"):
        await anext(llm.stream(TEXT))
    # asyncio's own executor may have grown by the thread that closed.
    assert threading.active_count() <= num_threads + 1


def test_an_interrupt_gives_up_the_batch_and_not_the_model(llm: LLM) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([TEXT] * 8, SamplingParams(max_tokens=1500, ignore_eos=True))
    timer.join()
    wait_until(llm, used=False)
    assert llm.generate(QUESTION, GREEDY)


def test_the_rest_of_the_context_ends_where_memory_does() -> None:
    with LLM(kv_tokens=512) as small:
        assert small.model.max_model_len == 512
        (output,) = small.generate([5, 6, 7], SamplingParams(temperature=0.0, n=1))
        assert output.outputs[0].finish_reason is not None
        with pytest.raises(InvalidRequestError, match="maximum context length is 512 tokens"):
            small.generate([5, 6, 7], SamplingParams(max_tokens=600))


def test_answers_and_failures_are_counted(llm: LLM) -> None:
    def count(name: str) -> float:
        found = re.search(rf"^distserve:{name}.* (\S+)$", llm.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = ("e2e_request_latency_seconds_count", 'requests_total{outcome="ok"}')
    before = [count(name) for name in names]
    llm.generate([TEXT, TEXT], GREEDY)
    assert [count(name) for name in names] == [value + 2 for value in before]


def test_a_bar_is_shown_if_wanted(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT] * 3, GREEDY, progress=True)
    assert "3/3" in capfd.readouterr().err
    llm.generate([TEXT] * 3, GREEDY, progress=False)
    llm.generate([TEXT] * 3, GREEDY)
    assert capfd.readouterr().err == ""


def run_script(script: str) -> str:
    """Run Python as a user does, in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_it_is_light_to_import_needs_no_server_and_ends_by_itself() -> None:
    script = """
        import sys
        import threading
        import distserve
        light = {"torch", "transformers", "pydantic", "numpy"} & sys.modules.keys()
        assert not light, f"importing distserve imports {light}"
        from distserve import LLM, SamplingParams
        assert "torch" in sys.modules
        llm = LLM(kv_tokens=2048, threads=1)
        (output,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        heavy = {"ray", "fastapi", "starlette", "uvicorn", "aiohttp"} & sys.modules.keys()
        assert not heavy, f"{heavy} were imported"
        assert threading.active_count() > 1
        del llm
        print(len(output.outputs[0].token_ids), threading.active_count())
        another = LLM(kv_tokens=2048, threads=1)  # which nobody closes
    """
    assert run_script(script).split() == ["3", "1"]


def test_what_the_package_offers_is_listed() -> None:
    import distserve

    assert {"LLM", "SamplingParams", "Chat"} <= set(dir(distserve))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = distserve.LLMs
