"""In bfloat16 all implementations compute the same model, up to rounding."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from distserve.core.config import KvConfig
from distserve.engine.fused import FusedModel
from distserve.engine.worker import Worker
from tests.engine.harness import Harness, make_request
from tests.engine.models import VOCAB, save

# Sizes that native kernels accept: heads of 32, matrices of multiples of 32.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-biases": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=20),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
PROMPT = torch.randint(3, VOCAB, (75,), generator=torch.Generator().manual_seed(0)).tolist()


def prompt_logprobs(worker: Worker, chunk: int | None = None) -> torch.Tensor:
    track = Harness(worker).generate(make_request(PROMPT, prompt_logprobs=0), 1, chunk)
    return torch.tensor([entry.logprob for entry in track.prompt_logprobs])


@pytest.fixture(scope="module", params=CONFIGS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CONFIGS[request.param], tmp_path_factory.mktemp(request.param), scale=0.1)


def test_fused_and_reference_agree(path: Path) -> None:
    exact = prompt_logprobs(Worker(path, kv=KvConfig(16, 16)))
    reference = prompt_logprobs(Worker(path, dtype="bfloat16", kv=KvConfig(16, 16), fused=False))
    worker = Worker(path, dtype="bfloat16", kv=KvConfig(16, 16))
    assert isinstance(worker._model, FusedModel)
    rounding = (reference - exact).abs().mean()
    assert rounding < 0.03
    for chunk in (None, 1, 21):
        fused = prompt_logprobs(worker, chunk)
        assert (fused - exact).abs().mean() < 1.5 * rounding
        assert (fused - exact).abs().max() < 0.15


def test_small_blocks_run_too(path: Path) -> None:
    exact = prompt_logprobs(Worker(path, kv=KvConfig(64, 4)))
    found = prompt_logprobs(Worker(path, dtype="bfloat16", kv=KvConfig(64, 4)), 7)
    assert (found - exact).abs().max() < 0.15


def test_decoding_in_a_batch_stays_close_to_prefill(path: Path) -> None:
    """Each token's log-probability as decoded beside others is near what a prefill of the same text gives."""
    worker = Worker(path, dtype="bfloat16", kv=KvConfig(64, 16))
    harness = Harness(worker)
    tracks = [harness.open(make_request(PROMPT[:n], logprobs=0)) for n in (5, 16, 33, 60)]
    for track in tracks:
        harness.prefill(track)
    harness.decode(tracks, 20)
    for track in tracks:
        text = [*track.request.prompt_token_ids, *track.output]
        again = harness.generate(make_request(text, prompt_logprobs=0), 1).prompt_logprobs
        for decoded, prefilled in zip(track.logprobs, again[-len(track.output) :], strict=True):
            assert decoded is not None
            assert decoded.logprob == pytest.approx(prefilled.logprob, abs=0.1)
        harness.close(track)
