"""Every supported model, along every path a sequence can take, says what transformers' generate says."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import Harness, make_request
from tests.engine.models import CONFIGS

# Those with fused kernels also run on transformers' own modules, the reference that other models have.
BOTH_WAYS = ["llama", "llama-biases", "mistral-sliding", "qwen2-sliding", "qwen3"]


@pytest.fixture(scope="module", params=[*CONFIGS, *(f"{name}:reference" for name in BOTH_WAYS)])
def model(request: pytest.FixtureRequest, served: Callable[[str], Served]) -> Served:
    name, _, way = request.param.partition(":")
    return replace(served(name), fused=not way)


@pytest.fixture(scope="module")
def worker(model: Served) -> Worker:
    return model.worker()


def test_texts_vary_enough_to_tell_right_from_wrong(model: Served) -> None:
    assert len({token for text in model.expected for token in text}) >= 10
    assert len(set(map(tuple, model.expected))) == len(model.prompts)


@pytest.mark.parametrize("chunk", [None, 1, 3, 6, 7, 16])
def test_prefill_whole_or_in_chunks(model: Served, worker: Worker, chunk: int | None) -> None:
    harness = Harness(worker)
    tracks = [harness.open(make_request(prompt)) for prompt in model.prompts]
    for track in tracks:
        harness.prefill(track, chunk)
    harness.decode(tracks, NUM_TOKENS - 1)
    for track in tracks:
        harness.close(track)
    assert [track.output for track in tracks] == model.expected


def test_migrated_to_another_pool(model: Served, worker: Worker) -> None:
    source, target = Harness(worker, seed=1), Harness(model.worker(num_blocks=40), seed=2)
    # Something else occupies the target, so that no block keeps its id.
    other = target.open(make_request(model.prompts[0]))
    target.prefill(other)
    for num_before in (1, 4):
        for prompt, expected in zip(model.prompts, model.expected, strict=True):
            track = source.open(make_request(prompt))
            source.prefill(track, 7)
            source.decode([track], num_before - 1)
            moved = source.migrate(track, target)
            target.decode([moved], NUM_TOKENS - num_before)
            target.close(moved)
            assert moved.output == expected


@pytest.mark.parametrize("chunk", [None, 5])
def test_preempted_and_recomputed(model: Served, worker: Worker, chunk: int | None) -> None:
    harness = Harness(worker)
    for prompt, expected in zip(model.prompts, model.expected, strict=True):
        track = harness.open(make_request(prompt))
        harness.prefill(track)
        harness.decode([track], 5)
        harness.close(track)
        again = harness.open(make_request(prompt), output=track.output)
        harness.prefill(again, chunk)
        harness.decode([again], NUM_TOKENS - len(again.output))
        harness.close(again)
        assert again.output == expected


def test_batched_with_others(model: Served, worker: Worker) -> None:
    """Sequences join one by one: steps hold decodes, last chunks and chunks in the middle of prompts together."""
    harness = Harness(worker)
    waiting = [harness.open(make_request(prompt)) for prompt in model.prompts]
    tracks = list(waiting)
    while any(len(track.output) < NUM_TOKENS for track in tracks):
        running = [track for track in tracks if 0 < len(track.output) < NUM_TOKENS]
        work = [(track, 1) for track in running]
        filling = [track for track in tracks if not track.output][:2]
        work += [(track, min(track.num_tokens - track.num_computed, 9)) for track in filling]
        harness.step(*work)
    for track, expected in zip(tracks, model.expected, strict=True):
        harness.close(track)
        assert track.output == expected
