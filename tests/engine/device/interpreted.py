"""Greedy text by way of the Triton kernels, interpreted on the CPU, with padding as a card's kernels know it.

Run in a process of its own: what is interpreted is chosen when triton is imported. Prints texts and replays as JSON.
"""

import json
import sys
from pathlib import Path

from distserve_kernels.gpu.interpreter import interpret

interpret()

import torch  # noqa: E402

from distserve.core.config import KvConfig  # noqa: E402
from distserve.engine.device.backend import HostBackend  # noqa: E402
from distserve.engine.worker import Worker  # noqa: E402
from distserve_kernels import experts, ops  # noqa: E402
from tests.engine.harness import Harness, make_request  # noqa: E402


class InterpretingBackend(HostBackend):
    """Rows of padding are told by their negative positions, as on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.skips_padding = True


def main(path: Path, prompts: list[list[int]], num_tokens: int) -> dict[str, object]:
    calls = 0

    def runs_here(*tensors: torch.Tensor) -> bool:
        nonlocal calls
        calls += 1
        return True

    ops.runs_here = runs_here
    experts.runs_here = runs_here
    backend = InterpretingBackend()
    worker = Worker(path, kv=KvConfig(24, 4), backend=backend, max_batch_size=4)
    assert worker.kv.blocks.shape[2] == 24, "no spare block: padding stores nothing"
    harness = Harness(worker)
    tracks = [harness.open(make_request(prompt)) for prompt in prompts]
    harness.step(*((track, track.num_tokens) for track in tracks[:2]))
    harness.step((tracks[2], tracks[2].num_tokens), (tracks[0], 1))
    worker.kv.blocks[:, :, harness.free] = torch.nan
    while open_tracks := [track for track in tracks if len(track.output) < num_tokens]:
        harness.decode(open_tracks, 1)
    untouched = bool(worker.kv.blocks[:, :, harness.free].isnan().all())
    return {
        "texts": [track.output for track in tracks],
        "calls": calls,
        "replays": backend.num_replays,
        "untouched": untouched,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))))
