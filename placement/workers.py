"""Processes that simulate. Tasks themselves only wait for runs, so they are threads here; each run is a process's work.

So every core is busy as long as any task has a run to make, be it the longest alone.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from threading import Lock
from types import TracebackType
from typing import Protocol, Self, TypeVar

from placement.deployment import Deployed
from placement.measure import Run, Runs
from placement.tasks import Setting
from simulator.results import Simulation

_MAX_TASKS = 32
"""Tasks that wait for runs at a time."""


class Simulated(Protocol):
    """What a task found out."""

    @property
    def num_simulated(self) -> int:
        """Requests that were simulated for it."""
        ...


T = TypeVar("T", bound=Simulated)
U = TypeVar("U")


class Workers:
    """Runs tasks on ``num_workers`` processes (None: one per core); with one they run here. A context manager."""

    def __init__(self, setting: Setting, num_workers: int | None) -> None:
        self.num_requests = 0
        """Simulated so far, all tasks together."""
        self._counting = Lock()
        self._setting = setting
        self._num_workers = num_workers or os.cpu_count() or 1
        self._processes: ProcessPoolExecutor | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._num_workers > 1:
            # Spawned, not forked: the caller may have threads.
            self._processes = ProcessPoolExecutor(
                self._num_workers, get_context("spawn"), initializer=_begin, initargs=(self._setting,)
            )
            self._threads = ThreadPoolExecutor(_MAX_TASKS, "planner-task")
            self._setting = _Pooled(self._setting.problem, self._setting.offered, self._processes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes is not None and self._threads is not None:
            self._processes.shutdown(cancel_futures=True)  # what tasks wait for ends, or is cancelled
            self._threads.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Callable[[Setting], T]]) -> list[T]:
        """The tasks' results, in the tasks' order."""
        results = [self.begin(task) for task in tasks]
        return [result() for result in results]

    def begin(self, task: Callable[[Setting], T]) -> Callable[[], T]:
        """Start a task beside those of :meth:`run`; calling the answer waits for it, or with one worker runs it."""
        if self._threads is None:
            return partial(self._execute, task)
        return self._threads.submit(self._execute, task).result

    def side_by_side(self, functions: Sequence[Callable[[], U]]) -> list[U]:
        """What ``functions``, which run tasks, answer, in their order."""
        if self._threads is None:
            return [function() for function in functions]
        return [future.result() for future in [self._threads.submit(function) for function in functions]]

    def _execute(self, task: Callable[[Setting], T]) -> T:
        result = task(self._setting)
        with self._counting:
            self.num_requests += result.num_simulated
        return result


@dataclass(frozen=True)
class _Pooled(Setting):
    """A setting whose runs are made by ``processes``."""

    processes: ProcessPoolExecutor

    def runs(self, deployed: Deployed) -> Runs:
        """See :class:`Setting`."""

        def run(rate: float, numbers: Sequence[int], num_requests: int) -> list[Simulation]:
            runs: list[Future[Simulation]] = [
                self.processes.submit(_simulate, deployed, rate, number, num_requests) for number in numbers
            ]
            return [future.result() for future in runs]

        return run


# -- in a process of the pool ------------------------------------------------------------------------------------------

_setting: Setting | None = None


def _begin(setting: Setting) -> None:
    global _setting  # noqa: PLW0603 -- what every run of this process is about, sent once
    _setting = setting


def _simulate(deployed: Deployed, rate: float, number: int, num_requests: int) -> Simulation:
    return _run_of(deployed)(rate, number, num_requests)


@lru_cache(maxsize=16)
def _run_of(deployed: Deployed) -> Run:
    """Its model, built once for all rates and runs of a search."""
    assert _setting is not None, "a process of the pool knows its setting"
    return deployed.run(_setting.problem, _setting.offered)
