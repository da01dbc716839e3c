"""Announces how far a source's step is once the device has come so far: launching a layer is not having computed it."""

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from distserve.core.errors import TransferError
from distserve.transfer.cuda_ipc.device import Device, Event
from distserve.transfer.progress import SourceProgress

logger = logging.getLogger(__name__)

_LOOK = 200e-6
"""Seconds between looks at the device: a layer of a long prompt takes milliseconds."""


class ReadinessThread:
    """Writes ``progress`` as marks on ``device`` pass, in the order they were made.

    If the device fails, the progress words are retired: peers' pulls fail at once.
    """

    def __init__(self, device: Device, progress: SourceProgress) -> None:
        self._device = device
        self._progress = progress
        self._marks: queue.SimpleQueue[tuple[Event | None, Callable[[], None]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-readiness", daemon=True)
        self._thread.start()

    # The last layer is marked, so the stream of the step is the one last marked when it ends.

    def begin_step(self, step_id: int) -> None:
        """Earlier steps are complete once their own marks have passed, which is before this is announced."""
        self._marks.put((None, partial(self._progress.begin_step, step_id)))

    def layer_done(self, step_id: int, layer: int) -> None:
        """The layer has been launched by the calling thread."""
        self._marks.put((self._device.mark(), partial(self._progress.layer_done, step_id, layer)))

    def end_step(self, step_id: int) -> None:
        """All of the step has been launched, on the stream on which its last layer was."""
        self._marks.put((self._device.mark_again(), partial(self._progress.end_step, step_id)))

    def close(self) -> None:
        """Announce nothing more; returns when the thread has ended."""
        self._closed.set()
        self._marks.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (mark := self._marks.get()) is not None and self._wait(mark[0]):
                mark[1]()
        except TransferError:
            logger.exception("no KV of this rank can be pulled any more")
            self._progress.retire()

    def _wait(self, event: Event | None) -> bool:
        """Wait until ``event`` has passed; False if closed before."""
        while event is not None and not event.has_passed():
            if self._closed.wait(_LOOK):
                return False
        return not self._closed.is_set()
