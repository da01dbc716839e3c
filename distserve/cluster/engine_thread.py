"""The thread that computes: executes one instance's engine commands in order and reports what came of each step."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

from distserve.cluster.driver import EngineCommand
from distserve.core.commands import CloseSequence, OpenSequence, RunStep
from distserve.core.events import StepDone, StepFailed
from distserve.engine.group.driver import RankGroup
from distserve.engine.worker import Worker
from distserve.transfer.transport import Transport

logger = logging.getLogger(__name__)


class EngineThread:
    """Implements :class:`distserve.cluster.driver.Engine` with a worker and a transport.

    The model is loaded on the same thread that runs it, so that thread pools and core affinity are inherited from
    there. While a step runs, the transport learns of each layer whose KV is complete.

    Args:
        load: Makes the worker; runs on the engine thread.
        transport: Publishes the progress of steps.
        feed: Takes StepDone or StepFailed of every step, on the engine thread.
        cores: CPUs to run on; empty leaves the choice to the operating system.
    """

    def __init__(
        self,
        load: Callable[[], Worker | RankGroup],
        transport: Transport,
        feed: Callable[[StepDone | StepFailed], None],
        cores: Iterable[int] = (),
    ) -> None:
        self._load = load
        self._transport = transport
        self._feed = feed
        self._cores = frozenset(cores)
        self._commands: queue.SimpleQueue[EngineCommand | None] = queue.SimpleQueue()
        self._loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the worker and return when it is ready; raises what loading raises."""
        self._thread.start()
        self._loaded.result()

    def submit(self, command: EngineCommand) -> None:
        """Queue a command behind those before it."""
        self._commands.put(command)

    def close(self) -> None:
        """Finish the commands queued so far, then end the thread."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._cores:
                os.sched_setaffinity(0, self._cores)
            worker = self._load()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits for the worker
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while (command := self._commands.get()) is not None:
            match command:
                case OpenSequence():
                    worker.open(command)
                case CloseSequence(seq_id):
                    worker.close(seq_id)
                case RunStep() if isinstance(worker, RankGroup):
                    self._launch(worker, command)
                case RunStep() if worker.is_asynchronous:
                    self._launch_ahead(worker, command)
                case RunStep():
                    self._feed(self._step(worker, command))
        worker.shutdown()

    def _launch(self, group: RankGroup, command: RunStep) -> None:
        """Start a step of several ranks, whose outcome may be fed by another thread.

        A lost rank is not caught: the process ends, and supervision replaces the instance.
        """
        step_id = command.step_id
        self._transport.begin_step(step_id)
        group.launch(command, self._feed, partial(self._transport.layer_done, step_id))
        self._transport.end_step(step_id)

    def _launch_ahead(self, worker: Worker, command: RunStep) -> None:
        """Start a step on a device, whose outcome is fed by another thread.

        What the transport is told has been launched, not computed: a transport of device memory is made for that.
        """
        step_id = command.step_id
        self._transport.begin_step(step_id)
        try:
            worker.launch(command, self._feed, partial(self._transport.layer_done, step_id))
        except Exception as error:  # a step that fails must not take the instance's other sequences with it
            logger.exception("step %d failed", step_id)
            self._feed(StepFailed(step_id, f"{type(error).__name__}: {error}"))
            return
        self._transport.end_step(step_id)

    def _step(self, worker: Worker, command: RunStep) -> StepDone | StepFailed:
        step_id = command.step_id

        def layer_done(layer: int) -> None:
            self._transport.layer_done(step_id, layer)

        self._transport.begin_step(step_id)
        try:
            done = worker.run(command, layer_done)
        except Exception as error:  # a step that fails must not take the instance's other sequences with it
            logger.exception("step %d failed", step_id)
            return StepFailed(step_id, f"{type(error).__name__}: {error}")
        self._transport.end_step(step_id)
        return done
