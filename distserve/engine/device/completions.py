"""Waits for launched steps on a thread of its own, in order, and tells of each."""

import queue
import threading
from collections.abc import Callable

from distserve.core.events import StepDone, StepFailed
from distserve.engine.device.runner import PendingStep

OnDone = Callable[[StepDone | StepFailed], None]


class Completions:
    """Steps on their way. ``on_done`` of each is called on this object's thread."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[tuple[PendingStep, OnDone] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tokens", daemon=True)
        self._thread.start()

    def put(self, step: PendingStep, on_done: OnDone) -> None:
        """Tell ``on_done`` of the step's outcome when it is known."""
        self._steps.put((step, on_done))

    def close(self) -> None:
        """Wait for the steps put so far, and end."""
        self.end()
        self._thread.join()

    def end(self) -> None:
        """End after the steps put so far, without waiting for it."""
        self._steps.put(None)

    def _run(self) -> None:
        while (entry := self._steps.get()) is not None:
            step, on_done = entry
            outcome: StepDone | StepFailed
            try:
                outcome = step.wait()
            except RuntimeError as error:
                # The device has failed: whoever launches next hears of it, too.
                outcome = StepFailed(step.step_id, f"{type(error).__name__}: {error}")
            on_done(outcome)
