"""On a card: what the rehearsal on the CPU cannot show. Run with ``-m gpu``."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from distserve.core.config import KvConfig, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.engine.description import describe
from distserve.engine.fused import FusedModel
from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.device.test_device_runner import play
from tests.engine.harness import Harness, Track, generate_side_by_side, make_request
from tests.engine.models import CONFIGS, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.95, "top_k": 50, "frequency_penalty": 0.3, "logprobs": 2}


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def gpu_worker(served: Served, num_blocks: int = 96, block_size: int = 4, **options: object) -> Worker:
    return Worker(
        served.path, kv=KvConfig(num_blocks, block_size), **{"device": "cuda", "max_batch_size": 6, **options}
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def all_texts(served: Served, worker: Worker) -> list[list[int]]:
    return generate_side_by_side(worker, served.prompts, NUM_TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_in_float32_is_that_of_generate(served: Callable[[str], Served], name: str) -> None:
    model = served(name)
    assert all_texts(model, gpu_worker(model)) == model.expected


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_graphs_change_nothing(served: Callable[[str], Served], name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = served(name)
    worker = gpu_worker(model)
    assert "without CUDA graphs" not in caplog.text
    assert all_texts(model, worker) == all_texts(model, gpu_worker(model, graphs=False))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(served: Callable[[str], Served], tmp_path, dtype: str) -> None:
    # Small weights, as a trained model's: the text does not matter, the distribution does.
    path = save(CONFIGS["qwen3"], tmp_path, scale=0.08)
    prompt = served("qwen3").prompts[3]

    def logprobs(worker: Worker) -> torch.Tensor:
        harness = Harness(worker)
        track: Track = harness.open(make_request(prompt, prompt_logprobs=0))
        harness.prefill(track, 7)
        return torch.tensor([entry.logprob for entry in track.prompt_logprobs])

    exact = logprobs(Worker(path, kv=KvConfig(32, 16)))
    worker = Worker(path, dtype=dtype, kv=KvConfig(32, 16), device="cuda")
    assert isinstance(worker._runner._model, FusedModel)
    torch.testing.assert_close(logprobs(worker), exact, rtol=0, atol=0.05)


def test_the_same_seed_draws_what_the_cpu_draws(llama: Served) -> None:
    requests = [make_request(p, **{**SAMPLED, "seed": seed}) for seed, p in enumerate(llama.prompts)]
    texts = []
    for worker in (llama.worker(), gpu_worker(llama)):
        harness = Harness(worker)
        tracks = [harness.open(request) for request in requests]
        for track in tracks:
            harness.prefill(track)
        harness.decode(tracks, 20)
        texts.append([track.output for track in tracks])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_busy_instance_with_steps_ahead_gives_the_tokens_of_the_cpu(llama: Served, seed: int) -> None:
    config = SchedulerConfig(max_batch_tokens=48, max_batch_size=9, headroom=0.0)
    plain = play(llama.worker(num_blocks=40), config, seed, aborts=False)
    worker = gpu_worker(llama, num_blocks=40)
    ahead = SchedulerConfig(max_batch_tokens=48, max_batch_size=9, headroom=0.0, max_in_flight=2, lookahead=True)
    assert play(worker, ahead, seed, aborts=False).tokens() == plain.tokens()
    worker.shutdown()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2"])
def test_no_step_waits_for_the_device(served: Callable[[str], Served], name: str) -> None:
    model = served(name)
    worker = gpu_worker(model)
    for _ in range(2):  # at first kernels are compiled and workspaces allocated
        harness = Harness(worker)
        tracks = [harness.open(make_request(p, **SAMPLED, prompt_logprobs=1)) for p in model.prompts[:3]]
        plain = harness.open(make_request(model.prompts[3]))
        with no_waiting():
            harness.prefill(tracks[0])
            harness.step((plain, 20))
            harness.step((plain, plain.num_tokens - 20), (tracks[0], 1), (tracks[1], len(model.prompts[1])))
            harness.prefill(tracks[2])
            harness.copies.append((harness.free[0], harness.free[1]))
            harness.decode([plain, *tracks], 12)
            harness.decode([plain], 3)
        for track in (*tracks, plain):
            harness.close(track)


def test_uses_the_memory_it_is_given(llama: Served) -> None:
    layout = describe(llama.path).layout(KvConfig(32, 4), "float32")
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
    worker = gpu_worker(llama, 32, kv_buffer=buffer)
    buffer.zero_()
    track = Harness(worker).generate(make_request(llama.prompts[0]), NUM_TOKENS)
    assert track.output == llama.expected[0]
    written = buffer.view(torch.float32).view(layout.shape).abs().sum((0, 1, 4, 5)) > 0
    assert int(written.sum()) == len(llama.prompts[0]) + NUM_TOKENS - 1


def test_a_card_without_room_says_how_much_is_missing(llama: Served) -> None:
    layout = describe(llama.path).layout(KvConfig(1, 16), "float32")
    _, total = torch.cuda.mem_get_info()
    num_blocks = 2 * total // layout.num_bytes
    with pytest.raises(ConfigError, match=r"MiB are missing"):
        Worker(llama.path, kv=KvConfig(num_blocks, 16), device="cuda")
