"""HTTP in front of a real prefill and a real decode instance of the demo model, all in this process."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn

from distserve.api.app import create_app
from distserve.api.model import load_served_model
from distserve.api.settings import ApiSettings
from distserve.cluster.clock import cluster_time
from distserve.cluster.local import LocalCluster
from distserve.core.config import KvConfig, SchedulerConfig
from distserve.demo import model_dir

NUM_BLOCKS = 64
KV = KvConfig(num_blocks=NUM_BLOCKS)  # 1024 tokens: less than the model's context
QUESTION = [{"role": "user", "content": "What is a list in Python?"}]
GREEDY = {"messages": QUESTION, "temperature": 0, "max_tokens": 40}


class Cluster(threading.Thread):
    """Runs the cluster and its endpoint in an event loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.up = threading.Event()
        self.server: uvicorn.Server | None = None

    def run(self) -> None:
        try:
            asyncio.run(self.main())
        finally:
            self.up.set()

    async def main(self) -> None:
        scheduler = SchedulerConfig(report_interval=0.02)
        async with LocalCluster(model_dir(), prefill=1, decode=1, kv=KV, scheduler=scheduler) as backend:
            model = load_served_model(model_dir(), names=("demo",))
            app = create_app(backend, model, ApiSettings(), clock=cluster_time)
            self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
                self.up.set()
                await self.server.serve(sockets=[listener])


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    cluster = Cluster()
    cluster.start()
    cluster.up.wait()
    assert cluster.port, "the cluster did not start"
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.port}", timeout=60) as http_client:
        yield http_client
    assert cluster.server is not None
    cluster.server.should_exit = True
    cluster.join()


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return post(client, "/v1/chat/completions", **{**GREEDY, **body})


def streamed(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/chat/completions", json={**GREEDY, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"]["content"] for event in events)


def kv_usage(client: httpx.Client) -> list[float]:
    lines = client.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith("distserve:kv_cache_usage_perc{")]


def wait_until_free(client: httpx.Client) -> None:
    deadline = time.monotonic() + 10
    while kv_usage(client) != [0.0, 0.0]:
        assert time.monotonic() < deadline, "KV blocks were not given back"
        time.sleep(0.02)


def wait_until_used(client: httpx.Client) -> None:
    deadline = time.monotonic() + 10
    while kv_usage(client) == [0.0, 0.0]:
        assert time.monotonic() < deadline, "nothing is being served"
        time.sleep(0.02)


@pytest.fixture
def answer(client: httpx.Client) -> dict[str, Any]:
    return chat(client, return_token_ids=True)


def test_streamed_or_whole_is_the_same_text(client: httpx.Client, answer: dict[str, Any]) -> None:
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    assert len(choice["message"]["content"]) > 20
    events = streamed(client, return_token_ids=True)
    assert text_of(events) == choice["message"]["content"]
    assert [i for event in events[1:] for i in event["choices"][0]["token_ids"]] == choice["token_ids"]
    assert client.get("/health").status_code == 200


def test_every_stop_string_ends_where_it_first_occurs(client: httpx.Client, answer: dict[str, Any]) -> None:
    text = answer["choices"][0]["message"]["content"]
    for start in range(2, len(text) - 6, 9):
        stop = text[start : start + 5]
        expected = text[: text.find(stop)]
        [choice] = chat(client, stop=stop)["choices"]
        assert (choice["message"]["content"], choice["stop_reason"]) == (expected, stop)
        assert text_of(streamed(client, stop=[stop, "never said"])) == expected
    wait_until_free(client)


def test_a_seed_repeats_and_choices_differ(client: httpx.Client) -> None:
    options = {"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 12}
    first, second = ([choice["message"]["content"] for choice in chat(client, **options)["choices"]] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
    other = chat(client, **{**options, "seed": 6})["choices"][0]["message"]["content"]
    assert other != first[0]


def test_batched_prompts_are_answered_as_if_alone(client: httpx.Client) -> None:
    prompts = [[5 + i, 6, 7 + 3 * i] for i in range(6)]
    options = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}
    batch = post(client, "/v1/completions", prompt=prompts, **options)["choices"]
    with ThreadPoolExecutor() as executor:
        alone = list(executor.map(lambda prompt: post(client, "/v1/completions", prompt=prompt, **options), prompts))
    assert [choice["token_ids"] for choice in batch] == [body["choices"][0]["token_ids"] for body in alone]


def test_logprobs_cover_the_first_token_too(client: httpx.Client) -> None:
    content = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        assert entry["logprob"] == best[0] <= 0


def test_echoed_prompts_are_scored(client: httpx.Client) -> None:
    body = post(client, "/v1/completions", prompt="Return a list", echo=True, logprobs=1, max_tokens=0)
    logprobs = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"] == "Return a list"
    assert logprobs["token_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])


def test_ends_are_obeyed(client: httpx.Client, answer: dict[str, Any]) -> None:
    tokens = answer["choices"][0]["token_ids"]
    [choice] = chat(client, stop_token_ids=[tokens[3]])["choices"]
    assert choice["stop_reason"] == tokens[3]
    biased = {"logit_bias": {"2": 100}}
    assert chat(client, **biased)["usage"]["completion_tokens"] == 1
    assert chat(client, **biased)["choices"][0]["finish_reason"] == "stop"
    assert chat(client, **biased, min_tokens=4)["usage"]["completion_tokens"] == 5
    assert chat(client, **biased, ignore_eos=True, max_tokens=7)["choices"][0]["finish_reason"] == "length"


def test_the_timeline_is_in_order(client: httpx.Client) -> None:
    timeline = chat(client, return_timeline=True, ignore_eos=True)["timeline"]
    # Migration overlaps prefill, so only these two orders hold.
    for names in (
        ("arrival", "prefill_start", "prefill_end", "first_token", "finish"),
        ("prefill_start", "migration_start", "migration_end", "decode_start", "finish"),
    ):
        times = [timeline[name] for name in names]
        assert times == sorted(times)
    assert len(timeline["tokens"]) == 40
    assert timeline["ttft_seconds"] >= timeline["queue_seconds"] + timeline["prefill_seconds"]


def test_leaving_frees_all_memory(client: httpx.Client) -> None:
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=10)
        body = {**GREEDY, "max_tokens": 800, "ignore_eos": True, "stream": stream, "n": 2}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        if stream:
            assert connection.getresponse().read(500)
        else:
            wait_until_used(client)
        connection.close()
        wait_until_free(client)
    assert chat(client, max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_never_fits_in_memory_is_refused(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": [5] * 1500, "max_tokens": 4})
    assert response.status_code == 400
    assert "1024" in response.json()["error"]["message"]
    assert chat(client, max_tokens=2)["usage"]["completion_tokens"] == 2
