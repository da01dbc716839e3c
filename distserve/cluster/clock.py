"""Time in a live cluster: the wall clock as it stood at start, advanced by the monotonic clock; and timers on it.

Machines compare times only with times of their own process, and timelines compare processes, so the parts must agree
to well below a millisecond on one host and as well as the hosts' clocks do across hosts.
"""

import heapq
import threading
import time
from collections.abc import Callable

_START = time.time() - time.monotonic()


def cluster_time() -> float:
    """Seconds since the epoch; never decreasing, whatever happens to the wall clock."""
    return _START + time.monotonic()


class TimerThread:
    """Calls back on a thread of its own at the times asked for.

    Args:
        callback: Called once or more at or after each time asked for; times due together share a call.
        name: Thread name, for whoever looks at the process.
    """

    def __init__(self, callback: Callable[[], None], name: str = "timers") -> None:
        self._callback = callback
        self._times: list[float] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin calling back."""
        self._thread.start()

    def close(self) -> None:
        """Call back no more; returns when a callback under way has ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def wake_at(self, time: float) -> None:
        """Ask for a call at ``time`` (seconds, cluster clock)."""
        with self._changed:
            earlier = not self._times or time < self._times[0]
            if earlier or time not in self._times:
                heapq.heappush(self._times, time)
            if earlier:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._times or self._times[0] > cluster_time()):
                    self._changed.wait(self._times[0] - cluster_time() if self._times else None)
                if self._stopped:
                    return
                now = cluster_time()
                while self._times and self._times[0] <= now:
                    heapq.heappop(self._times)
            self._callback()
