"""``return_timeline``: when each phase of a request happened, in the answer itself."""

from typing import Any

import pytest

from tests.api.conftest import Server


def check(timeline: dict[str, Any], num_tokens: int) -> None:
    arrival = timeline["arrival"]
    offsets = {"prefill_start": 0.1, "prefill_end": 0.3, "migration_start": 0.3, "migration_end": 0.35}
    for name, offset in {**offsets, "decode_start": 0.4}.items():
        assert timeline[name] - arrival == pytest.approx(offset, abs=1e-4)
    assert timeline["queue_seconds"] == pytest.approx(0.1, abs=1e-4)
    assert timeline["prefill_seconds"] == pytest.approx(0.2, abs=1e-4)
    assert timeline["migration_seconds"] == pytest.approx(0.05, abs=1e-4)
    tokens = timeline["tokens"]
    assert len(tokens) == num_tokens
    assert tokens == sorted(tokens)
    assert arrival < timeline["first_token"] == tokens[0]
    assert timeline["finish"] == tokens[-1]
    assert timeline["ttft_seconds"] == pytest.approx(tokens[0] - arrival)
    assert timeline["tpot_seconds"] == pytest.approx((tokens[-1] - tokens[0]) / (num_tokens - 1))
    assert timeline["e2e_seconds"] == pytest.approx(tokens[-1] - arrival)


@pytest.fixture
def paced(server: Server) -> Server:
    server.backend.delay = 0.01
    return server


def test_in_a_whole_answer(paced: Server) -> None:
    check(paced.complete(return_timeline=True, max_tokens=5)["timeline"], 5)
    check(paced.chat(return_timeline=True, max_tokens=5)["timeline"], 5)
    assert "timeline" not in paced.complete(max_tokens=5)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_in_the_last_event(paced: Server, path: str) -> None:
    *events, last = paced.events(path, return_timeline=True, max_tokens=5)
    check(last["timeline"], 5)
    assert not any("timeline" in event for event in events)


def test_of_each_choice(paced: Server) -> None:
    for choice in paced.complete(return_timeline=True, max_tokens=5, n=2)["choices"]:
        check(choice["timeline"], 5)
    events = paced.events(return_timeline=True, max_tokens=5, n=2)
    ends = [event for event in events if event["choices"][0]["finish_reason"] is not None]
    assert [event["choices"][0]["index"] for event in ends] == [0, 1]
    for event in ends:
        check(event["timeline"], 5)


def test_of_one_token(paced: Server) -> None:
    timeline = paced.complete(return_timeline=True, max_tokens=1)["timeline"]
    assert timeline["migration_seconds"] is None
    assert timeline["tpot_seconds"] is None
    assert timeline["ttft_seconds"] > 0
