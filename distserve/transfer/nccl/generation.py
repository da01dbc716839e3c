"""One generation's communicator, from its name to its end. What may hang runs on a thread of its own.

The thread can be abandoned: whatever it is stuck in, others look at queues only. It says TornDown as the last thing it
does, when no kernel uses the communicator any more.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from torch import Tensor

from distserve.transfer.nccl.agreement import Broken, Event, Moved, Named, Opened, TornDown
from distserve.transfer.nccl.collectives import Collectives, Communicator
from distserve.transfer.nccl.device import Completion

_logger = logging.getLogger(__name__)

_LOOK = 1e-3
"""Seconds between two looks at a kernel that is to end after an abort."""


class Generation:
    """Commands come from one thread, the owner's; ``report`` is called on any, and must not block."""

    def __init__(self, number: int, collectives: Collectives, report: Callable[[Event], None]) -> None:
        self._number = number
        self._collectives = collectives
        self._report = report
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Guards the two below: a communicator that is made too late must be ended by whoever made it.
        self._lock = threading.Lock()
        self._communicator: Communicator | None = None
        self._is_over = False
        # Only the generation's own thread has these two. Operations are matched by their order: once one could not be
        # launched, the next would meet the other end's half of it.
        self._is_broken = False
        # Only the last of a stream's operations has to be waited for.
        self._last: Completion | None = None
        self._launched: queue.SimpleQueue[tuple[int, Completion]] = queue.SimpleQueue()
        # Only the owner's thread has these.
        self._under_way: list[tuple[int, Completion]] = []
        self._is_polled = True
        self._thread = threading.Thread(target=self._run, name=f"kv-nccl-{number}", daemon=True)
        self._thread.start()

    def make_id(self) -> None:
        """Report Named."""
        self._jobs.put(lambda: self._report(Named(self._number, self._collectives.unique_id())))

    def open(self, unique_id: bytes, rank: int) -> None:
        """Report Opened."""
        self._jobs.put(lambda: self._open(unique_id, rank))

    def send(self, op_id: int, memory: Tensor) -> None:
        """Report Moved, by :meth:`poll`."""
        self._jobs.put(lambda: self._launch(op_id, memory, sends=True))

    def recv(self, op_id: int, memory: Tensor) -> None:
        """Report Moved, by :meth:`poll`."""
        self._jobs.put(lambda: self._launch(op_id, memory, sends=False))

    def poll(self) -> list[Event]:
        """What has ended or failed since; never waits."""
        if not self._is_polled:
            return []
        while True:
            try:
                self._under_way.append(self._launched.get_nowait())
            except queue.Empty:
                break
        events: list[Event] = []
        try:
            ended = [op_id for op_id, completion in self._under_way if completion.query()]
            # The error after the end: an operation that failed may have ended too.
            if self._communicator is not None and self._under_way:
                self._communicator.check()
            self._under_way = [(op_id, completion) for op_id, completion in self._under_way if op_id not in ended]
            events += [Moved(self._number, op_id) for op_id in ended]
        except RuntimeError as error:
            events.append(Broken(self._number, str(error)))
        return events

    @property
    def is_moving(self) -> bool:
        """Whether :meth:`poll` may have something to say soon."""
        return self._is_polled and bool(self._under_way or not self._launched.empty())

    def abort(self) -> None:
        """End it now, from another thread: its own may be stuck in it, and abort may hang as well.

        If it is still being made, its own thread ends it as soon as it comes back.
        """
        communicator = self._end()
        if communicator is None:
            self._jobs.put(None)
            return

        def abort() -> None:
            try:
                communicator.abort()
            except RuntimeError as error:
                _logger.warning("aborting communicator %d: %s", self._number, error)
            finally:
                self._jobs.put(None)

        threading.Thread(target=abort, name=f"kv-nccl-abort-{self._number}", daemon=True).start()

    def destroy(self) -> None:
        """End it, which is idle."""
        communicator = self._end()
        assert communicator is not None
        self._jobs.put(communicator.destroy)
        self._jobs.put(None)

    def _end(self) -> Communicator | None:
        self._is_polled = False
        with self._lock:
            self._is_over = True
            return self._communicator

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                try:
                    job()
                except Exception as error:  # noqa: BLE001  # whatever a library raises ends the generation, not more
                    self._is_broken = True
                    self._report(Broken(self._number, str(error) or type(error).__name__))
            self._tear_down()
        finally:
            self._report(TornDown(self._number))

    def _open(self, unique_id: bytes, rank: int) -> None:
        made = self._collectives.communicator(unique_id, rank)
        with self._lock:
            if not self._is_over:
                self._communicator = made
                self._report(Opened(self._number))
                return
        made.abort()

    def _launch(self, op_id: int, memory: Tensor, *, sends: bool) -> None:
        with self._lock:
            communicator = None if self._is_over or self._is_broken else self._communicator
        if communicator is not None:
            self._last = communicator.send(memory) if sends else communicator.recv(memory)
            self._launched.put((op_id, self._last))

    def _tear_down(self) -> None:
        try:
            while self._last is not None and not self._last.query():
                time.sleep(_LOOK)
        except RuntimeError as error:
            # A device that has failed runs no kernel any more.
            _logger.warning("ending communicator %d: %s", self._number, error)
