"""The device's way of running steps, rehearsed on the CPU: padding, rungs, static buffers, draws, steps ahead."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.config import KvConfig, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.events import NOT_FINITE
from distserve.core.request import Request, SamplingParams
from distserve.engine.device.backend import HostBackend
from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.device.driving import Driven
from tests.engine.harness import Harness, generate_side_by_side, generate_while_blocks_move, make_request
from tests.engine.models import CONFIGS, VOCAB

SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.95, "frequency_penalty": 0.3, "presence_penalty": 0.2}


def rehearsal(served: Served, num_blocks: int = 96, block_size: int = 4, **options: object) -> Worker:
    return Worker(
        served.path, kv=KvConfig(num_blocks, block_size), **{"backend": HostBackend(), "max_batch_size": 6, **options}
    )


@pytest.fixture(scope="module")
def backend() -> HostBackend:
    return HostBackend()


@pytest.fixture(scope="module")
def worker(llama: Served, backend: HostBackend) -> Worker:
    return rehearsal(llama, backend=backend)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "reference"])
def test_greedy_text_is_that_of_generate(served: Callable[[str], Served], name: str, fused: bool) -> None:
    model = served(name)
    assert generate_side_by_side(rehearsal(model, fused=fused), model.prompts, NUM_TOKENS) == model.expected


def requests_of(rng: random.Random, count: int) -> list[Request]:
    requests = []
    for number in range(count):
        params: dict[str, object] = {"max_tokens": rng.randint(1, 14), "seed": rng.getrandbits(64)}
        params["temperature"] = rng.choice([0.0, 0.0, 0.8, 1.3])
        for name, values in {
            "top_p": [1.0, 0.9],
            "top_k": [0, 20],
            "min_p": [0.0, 0.02],
            "repetition_penalty": [1.0, 1.2],
            "presence_penalty": [0.0, 0.4],
            "frequency_penalty": [0.0, 0.3],
            "min_tokens": [0, 4],
            "logprobs": [None, 2],
            "prompt_logprobs": [None, None, 1],
            "logit_bias": [(), ((7, 2.0), (9, -50.0))],
            "stop_token_ids": [(), tuple(range(20, 60))],
        }.items():
            if rng.random() < 0.3:
                params[name] = rng.choice(values)
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 3, 9, 24, 40])))
        choices = tuple(range(rng.choice([1, 1, 1, 3])))
        requests.append(
            Request(f"r{number:02}", "owner", prompt, SamplingParams(**params), choices=choices, arrival=float(number))
        )
    return requests


def play(worker: Worker, config: SchedulerConfig, seed: int, *, aborts: bool) -> Driven:
    rng = random.Random(seed)
    driven = Driven(worker, config)
    requests = requests_of(rng, 14)
    for request in requests:
        driven.submit(request)
        for _ in range(rng.randint(0, 3)):
            if driven.in_flight:
                driven.finish_step()
        if aborts and rng.random() < 0.4:
            driven.abort(request)
    driven.run_out()
    assert not driven.failed
    assert driven.scheduler.blocks.num_free == worker.layout.num_blocks
    return driven


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_busy_instance_gives_the_tokens_of_the_cpu_worker(llama: Served, seed: int) -> None:
    """Mixed batches, forks, evictions, batches beyond the ladder, every sampling option, two steps on their way."""
    config = SchedulerConfig(max_batch_tokens=48, max_batch_size=9, headroom=0.0)
    plain = play(llama.worker(num_blocks=24), config, seed, aborts=False)
    worker = rehearsal(llama, num_blocks=24, max_batch_size=3)
    ahead = play(worker, replace(config, max_in_flight=2, lookahead=True), seed, aborts=False)
    worker.shutdown()
    assert ahead.most_in_flight == 2
    assert max(len(step.chunks) for step in ahead.steps) > 4
    assert ahead.scheduler.totals.num_preempted > 0
    assert ahead.tokens() == plain.tokens()
    for key, outputs in plain.outputs.items():
        for mine, theirs in zip(ahead.outputs[key], outputs, strict=True):
            assert (mine.logprobs is None) == (theirs.logprobs is None)
            if mine.logprobs is not None and theirs.logprobs is not None:
                assert mine.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-4)
                assert [token for token, _ in mine.logprobs.top] == [token for token, _ in theirs.logprobs.top]
            assert len(mine.prompt_logprobs or ()) == len(theirs.prompt_logprobs or ())


@pytest.mark.parametrize(("in_flight", "lookahead"), [(1, False), (2, True), (3, True), (2, False)])
def test_sequences_that_leave_in_the_middle_change_nothing_for_the_others(
    llama: Served, worker: Worker, backend: HostBackend, in_flight: int, lookahead: bool
) -> None:
    config = SchedulerConfig(max_batch_tokens=32, max_batch_size=9, headroom=0.0)
    expected = play(llama.worker(), config, 77, aborts=False).tokens()
    before = backend.num_replays
    ahead = replace(config, max_in_flight=in_flight, lookahead=lookahead)
    found = play(worker, ahead, 77, aborts=True).tokens()
    assert backend.num_replays > before + 10
    assert sum(map(len, found.values())) < sum(map(len, expected.values()))
    for key, tokens in found.items():
        assert tokens == expected[key][: len(tokens)]


def test_padding_writes_to_no_block_of_a_sequence(llama: Served, worker: Worker) -> None:
    harness = Harness(worker)
    tracks = [harness.open(make_request(prompt)) for prompt in llama.prompts[:3]]
    for track in tracks:
        harness.prefill(track)
    worker.kv.blocks[:, :, harness.free] = 77.0
    # Enough room is in the last block: nothing of these two steps goes to another one.
    before = {track.seq_id: len(track.blocks) for track in tracks}
    harness.decode(tracks, 2)
    grown = {block for track in tracks for block in track.blocks[before[track.seq_id] :]}
    untouched = [block for block in harness.free if block not in grown]
    assert bool((worker.kv.blocks[:, :, untouched] == 77.0).all())
    assert worker.kv.blocks.shape[2] == worker.layout.num_blocks + 1
    for track in tracks:
        harness.close(track)


def test_blocks_may_change_under_an_unchanged_batch(llama: Served, worker: Worker) -> None:
    assert generate_while_blocks_move(worker, llama.prompts, NUM_TOKENS) == llama.expected


def test_migrated_between_the_cpu_and_the_device(llama: Served, worker: Worker) -> None:
    request = make_request(llama.prompts[1], **SAMPLED, min_tokens=8, stop_token_ids=(5, 9), repetition_penalty=1.1)
    cpu, device = Harness(llama.worker()), Harness(worker, seed=3)
    expected = cpu.generate(request, 20).output
    track = cpu.open(request)
    cpu.prefill(track)
    moved = cpu.migrate(track, device)
    device.decode([moved], 9)
    back = device.migrate(moved, cpu)
    cpu.decode([back], 10)
    cpu.close(back)
    assert back.output == expected


def test_a_model_that_cannot_be_captured_is_served_all_the_same(
    llama: Served, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(HostBackend):
        def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    worker = rehearsal(llama, backend=Refusing())
    assert "without CUDA graphs" in caplog.text
    assert Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS).output == llama.expected[0]


def test_graphs_that_replay_what_they_were_captured_with_are_not_served(
    llama: Served, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(HostBackend):
        def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            result = run().clone()
            return lambda: result

    worker = rehearsal(llama, backend=Stuck())
    assert "other logits" in caplog.text
    assert Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS).output == llama.expected[0]


def test_graphs_may_be_left_out(llama: Served) -> None:
    backend = HostBackend()
    worker = rehearsal(llama, backend=backend, graphs=False)
    assert Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS).output == llama.expected[0]
    assert backend.num_replays == 0


def test_more_sequences_than_slots_at_first(llama: Served, worker: Worker) -> None:
    harness = Harness(worker)
    short = [harness.open(make_request([5 + number], max_tokens=1)) for number in range(80)]
    harness.step(*((track, 1) for track in short))
    for track in short[1:]:
        harness.close(track)
    track = harness.open(make_request(llama.prompts[0]))
    harness.prefill(track)
    harness.decode([track, short[0]], NUM_TOKENS - 1)
    assert track.output == llama.expected[0]
    for each in (track, short[0]):
        harness.close(each)


def test_logits_that_are_not_finite_fail_their_sequence_alone(llama: Served, worker: Worker) -> None:
    harness = Harness(worker)
    good, bad = (harness.open(make_request(llama.prompts[i])) for i in (0, 1))
    for track in (good, bad):
        harness.prefill(track)
    worker.kv.blocks[:, :, bad.blocks] = torch.nan
    harness.decode([good, bad], 2)
    assert bad.output[1:] == [NOT_FINITE] * 2
    harness.decode([good], NUM_TOKENS - 3)
    assert good.output == llama.expected[0]
    for block in bad.blocks:
        worker.kv.blocks[:, :, block] = 0.0
    for track in (good, bad):
        harness.close(track)


def test_a_token_that_is_none_fails_the_step_and_nothing_else(llama: Served, worker: Worker) -> None:
    for token in (VOCAB, 10**9, -1):
        worker.open(OpenSequence(10_000, make_request([token]), (0,), (), 0))
        with pytest.raises(IndexError, match="vocabulary"):
            worker.run(RunStep(1, (Chunk(10_000, 1, samples=True),), (TableUpdate(10_000, 0, (0,)),)))
        worker.close(10_000)
    assert Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS).output == llama.expected[0]


def test_layers_are_announced_whatever_way_the_step_takes(llama: Served, worker: Worker) -> None:
    harness = Harness(worker)
    track = harness.open(make_request(llama.prompts[0]))
    seen: list[int] = []
    for num_tokens in (len(llama.prompts[0]), 1, 1):
        harness.step((track, num_tokens), on_layer=seen.append)
    assert seen == [*range(worker.layout.num_layers)] * 3
    harness.close(track)


def test_a_step_may_hold_copies_alone(worker: Worker) -> None:
    worker.kv.blocks[:, :, 3] = 7.0
    assert worker.run(RunStep(1, (), copies=((3, 4),))).tokens == ()
    assert bool((worker.kv.blocks[:, :, 4] == 7.0).all())


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "CUDA devices"), ("cuda:3", "CUDA devices"), ("tpu", "cuda:N")]
)
def test_a_device_that_is_not_there(llama: Served, device: str, message: str) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=message):
        Worker(llama.path, kv=KvConfig(8, 4), device=device)


def test_float16_is_for_devices(llama: Served) -> None:
    worker = rehearsal(llama, dtype="float16")
    assert worker.layout.dtype == "float16"
    assert len(Harness(worker).generate(make_request(llama.prompts[0]), 4).output) == 4
