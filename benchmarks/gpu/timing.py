"""Times two operations against each other on a GPU: ours and what bounds it, alternating."""

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 1 << 30
"""More than any card's L2 cache, and a quarter of a millisecond of work: longer than a launch takes the host."""
_WARM_UP = 3


class Stopwatch:
    """Seconds of single calls. On a GPU between events on the stream, after the L2 cache was overwritten.

    Overwriting it keeps the device busy while the host launches what is timed, so no launch is in the time.
    """

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device = device
        self.repetitions = repetitions
        on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=device)

    def compare(self, ours: Callable[[], object], ceiling: Callable[[], object]) -> tuple[float, float, float]:
        """Median seconds of both, and the median over pairs of the ceiling's time over ours."""
        for _ in range(_WARM_UP if self.device.type == "cuda" else 0):
            ours()
            ceiling()
        pairs = [(self._once(ours), self._once(ceiling)) for _ in range(self.repetitions)]
        return (
            statistics.median(mine for mine, _ in pairs),
            statistics.median(best for _, best in pairs),
            statistics.median(best / mine for mine, best in pairs),
        )

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # torch does not annotate the constructor.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3
