"""One set of checks of the Triton kernels, run twice: interpreted on the CPU, and compiled where there is a GPU.

Triton interprets only what was imported under ``TRITON_INTERPRET=1``, so `test_interpreted.py` runs this folder in a
process of its own; elsewhere the interpreted half of the checks is not collected.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

collect_ignore_glob = [] if HAS_TRITON else ["test_*_kernels.py", "test_hopper.py"]

if INTERPRETED and HAS_TRITON:
    from distserve_kernels.gpu.interpreter import interpret

    interpret()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: interpreted on "cpu", compiled on "cuda"."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wrong_half(item: pytest.Item) -> bool:
        device = getattr(getattr(item, "callspec", None), "params", {}).get("device")
        return device == ("cuda" if INTERPRETED else "cpu") and Path(__file__).parent in item.path.parents

    dropped = [item for item in items if wrong_half(item)]
    items[:] = [item for item in items if not wrong_half(item)]
    config.hook.pytest_deselected(items=dropped)
