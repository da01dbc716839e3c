from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from distserve.core.config import KvConfig
from distserve.engine.worker import Worker
from tests.engine.models import CONFIGS, VOCAB, save
from tests.oracle import generate

NUM_TOKENS = 14
"""Length of the texts that the paths are compared by."""


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Served:
    """A tiny model: where it is, prompts for it and what transformers' own generation makes of them."""

    name: str
    path: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    fused: bool = True

    def worker(self, num_blocks: int = 96, block_size: int = 4) -> Worker:
        return Worker(self.path, kv=KvConfig(num_blocks, block_size), fused=self.fused)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """Tiny models by name, each made once."""
    made: dict[str, Served] = {}

    def make(name: str) -> Served:
        if name not in made:
            path = save(CONFIGS[name], tmp_path_factory.mktemp(name))
            # The eager implementation is the one that honours every model's peculiarities.
            reference = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
            generator = torch.Generator().manual_seed(5)
            prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (5, 17, 31, 40)]
            made[name] = Served(name, path, prompts, [generate(reference, prompt, NUM_TOKENS) for prompt in prompts])
        return made[name]

    return make


@pytest.fixture(scope="session")
def llama(served: Callable[[str], Served]) -> Served:
    return served("llama")


@pytest.fixture(scope="session")
def llama_worker(llama: Served) -> Worker:
    return llama.worker()
