"""How far a source's step is on its device, which may be behind what the host has launched.

The thread that runs the steps records an event per layer and goes on; others look which have passed.
"""

import threading
from collections import deque

from distserve.transfer.nccl.device import Completion, Device, Passed


class DeviceSteps:
    """The steps of one rank of ``num_layers`` layers on ``device``, in the order they were launched."""

    def __init__(self, device: Device, num_layers: int) -> None:
        self._device = device
        self._num_layers = num_layers
        # Guards the two below; held for no longer than it takes to look at events.
        self._lock = threading.Lock()
        self._launched: deque[tuple[int, int, Completion]] = deque()
        self._passed = (0, 0)

    def begin_step(self, step_id: int) -> None:
        """A step is being launched; on the device it starts when all before it have passed."""
        self._append(step_id, 0, Passed())

    def layer_done(self, step_id: int, layer: int) -> None:
        """The current stream computes the KV of layers up to ``layer`` by what was launched until now."""
        self._append(step_id, layer + 1, self._device.record())

    def end_step(self, step_id: int) -> None:
        """All of the step was launched."""
        self._append(step_id, self._num_layers, self._device.record())

    def layers_passed(self, step_id: int) -> int:
        """How many layers have their KV of ``step_id`` in memory; all of them if a later step has begun."""
        with self._lock:
            self._look()
            current, num_layers = self._passed
        if current != step_id:
            return self._num_layers if current > step_id else 0
        return num_layers

    def _append(self, step_id: int, num_layers: int, completion: Completion) -> None:
        with self._lock:
            self._launched.append((step_id, num_layers, completion))
            # Here too, or the queue would grow while nobody pulls.
            self._look()

    def _look(self) -> None:
        while self._launched and self._launched[0][2].query():
            step_id, num_layers, _ = self._launched.popleft()
            self._passed = (step_id, num_layers)
