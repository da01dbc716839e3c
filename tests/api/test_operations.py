"""Models, tokens, health, metrics, keys: what is there besides generation."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

import distserve
from distserve.api.model import ServedModel
from distserve.api.settings import ApiSettings
from distserve.core.config import Role
from distserve.core.messages import Status
from tests.api.conftest import Server, Start, backend_for
from tests.api.fake_backend import pool_status


def samples(server: Server) -> dict[tuple[str, tuple[str, ...]], float]:
    text = server.client.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_models_are_listed_under_each_name(server: Server) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("demo", 2048), ("alias", 2048)]
    assert server.client.get("/v1/models/alias").json() == listed["data"][1]


def test_any_name_is_answered_to(server: Server) -> None:
    assert server.complete(model="alias")["model"] == "alias"
    assert server.complete(model=None)["model"] == "demo"


def test_tokens_there_and_back(server: Server) -> None:
    body = server.post("/tokenize", prompt="Hello 🦊", return_token_strs=True).json()
    expected = server.tokenizer.encode("Hello 🦊", add_special_tokens=True)
    assert (body["tokens"], body["count"], body["max_model_len"]) == (expected, len(expected), 2048)
    assert body["token_strs"][0] == "<|begin|>"
    assert "Hello".startswith(body["token_strs"][1])
    assert len(body["token_strs"]) == body["count"]
    bare = server.post("/tokenize", prompt="Hello 🦊", add_special_tokens=False).json()
    assert bare["tokens"] == expected[1:]
    assert server.post("/detokenize", tokens=bare["tokens"]).json() == {"prompt": "Hello 🦊"}


def test_texts_past_the_context_can_be_counted(server: Server) -> None:
    text = "many words " * 5000
    assert server.post("/tokenize", prompt=text).json()["count"] > 10_000
    assert server.post("/tokenize", messages=[{"role": "user", "content": text}]).json()["count"] > 10_000


def test_a_conversation_is_tokenised_as_it_would_be_served(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    tokens = server.post("/tokenize", messages=messages).json()["tokens"]
    server.chat(messages=messages, max_tokens=1)
    assert tokens == list(server.backend.submitted[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("roles", "code", "missing"),
    [
        ([Role.PREFILL, Role.DECODE], 200, None),
        ([Role.MIXED], 200, None),
        ([Role.PREFILL], 503, ["decode"]),
        ([Role.DECODE, Role.DECODE], 503, ["prefill"]),
        ([], 503, ["prefill", "decode"]),
    ],
)
def test_health_says_which_pool_is_missing(server: Server, roles: list[Role], code: int, missing: list[str]) -> None:
    server.backend.current = pool_status(*roles)
    response = server.client.get("/health")
    assert response.status_code == code
    body = response.json()
    assert body.get("missing") == missing
    assert sum(pool["instances"] for pool in body["pools"].values()) == len(roles)
    assert ("error" in body) == (code != 200)


def test_health_without_a_router(server: Server) -> None:
    server.backend.current = None
    response = server.client.get("/health")
    assert response.status_code == 503
    assert "router" in response.json()["error"]["message"]
    assert server.client.get("/metrics").status_code == 200


def test_version(server: Server) -> None:
    assert server.client.get("/version").json() == {"version": distserve.__version__}


def test_metrics_count_what_happened(server: Server) -> None:
    tokens = server.complete(n=2)["usage"]
    server.events(max_tokens=3)
    server.post("/v1/completions", prompt="")
    found = samples(server)
    assert found["distserve:requests_total", ("ok",)] == 2
    assert found["distserve:requests_total", ("400",)] == 1
    assert found["distserve:prompt_tokens_total", ("demo",)] == 2 * tokens["prompt_tokens"]
    assert found["distserve:generation_tokens_total", ("demo",)] == tokens["completion_tokens"] + 3
    assert found["distserve:request_success_total", ("stop", "demo")] == 2
    assert found["distserve:request_success_total", ("length", "demo")] == 1
    assert found["distserve:time_to_first_token_seconds_count", ("demo",)] == 2
    assert found["distserve:inter_token_latency_seconds_count", ("demo",)] == tokens["completion_tokens"] - 2 + 2
    assert found["distserve:request_time_per_output_token_seconds_count", ("demo",)] == 3
    assert found["distserve:e2e_request_latency_seconds_count", ("demo",)] == 2
    assert found["distserve:request_migration_time_seconds_sum", ("demo",)] == pytest.approx(3 * 0.05, abs=1e-4)
    assert found["distserve:request_prefill_time_seconds_sum", ("demo",)] == pytest.approx(3 * 0.2, abs=1e-4)


def test_metrics_show_the_pools(server: Server) -> None:
    found = samples(server)
    for pool in ("prefill-0", "decode-1"):
        labels = (pool, pool[:-2])  # instance, pool
        assert found["distserve:num_requests_running", labels] == 2
        assert found["distserve:num_requests_waiting", labels] == 3
        assert found["distserve:kv_cache_usage_perc", labels] == 0.25
        assert found["distserve:num_preemptions_total", labels] == 1
        assert found["distserve:kv_migration_bytes_total", labels] == 4096
        assert found["distserve:kv_migration_seconds_total", labels] == 0.5
        assert found["distserve:prefix_cache_queries_total", labels] == 100
        assert found["distserve:prefix_cache_hits_total", labels] == 60


@pytest.fixture
def locked(start: Start, demo_model: ServedModel) -> Server:
    return start(backend_for(demo_model), demo_model, ApiSettings(api_key="sesame"))


def test_a_key_guards_what_costs(locked: Server) -> None:
    body = {"prompt": "Hello", "messages": [{"role": "user", "content": "x"}], "tokens": [5], "max_tokens": 1}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        for key in (None, "Bearer wrong", "Bearer", "sesame", "Bearer sésame"):
            headers = {} if key is None else {"authorization": key.encode()}
            response = locked.client.post(path, json=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert locked.client.get("/v1/models").status_code == 401
    assert locked.backend.submitted == []
    assert locked.client.get("/v1/models", headers={"authorization": "bearer sesame"}).status_code == 200
    fine = {"authorization": "Bearer sesame"}
    assert locked.client.post("/v1/completions", json=body, headers=fine).status_code == 200
    assert locked.client.get("/v1/models", headers=fine).status_code == 200
    for path in ("/health", "/version", "/metrics", "/docs", "/openapi.json"):
        assert locked.client.get(path).status_code == 200
    found = samples(locked)
    assert found["distserve:requests_total", ("401",)] == 10
    assert found["distserve:requests_total", ("ok",)] == 1


def test_other_origins_are_not_invited(server: Server) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in server.client.options("/v1/completions", headers=headers).headers
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=headers).headers


def test_status_of_an_empty_cluster_is_no_error(server: Server) -> None:
    server.backend.current = Status(())
    assert server.client.get("/metrics").status_code == 200
