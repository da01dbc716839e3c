"""Issuing a workload's requests on time and collecting their records.

Open loop: a request is sent when it is due, whatever became of those before it. Closed loop: each of ``num_clients``
sends its next request when its last one ended. Every run is bounded in count and time: arrivals end, and each request
has a deadline.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distserve.bench.client import CANNOT_CONNECT, Client
from distserve.bench.records import RequestRecord, Status
from distserve.bench.workload import Workload

T = TypeVar("T")

_MONITOR_SECONDS = 0.25
_MADE_AHEAD = 64
_IDLE_SECONDS = 0.01
_DEAD_AFTER = 5
"""So many requests in a row that find no server end the run: it died."""


@dataclass
class Run:
    """A run in progress, then its result.

    ``records`` in order of issue; ``end`` seconds after the start. ``stopped``: why it ended before its workload did
    (empty: it did not), with ``interrupted`` when it was the user and ``server_died`` when it was the server.
    """

    num_planned: int
    records: list[RequestRecord] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    end: float = 0.0
    stopped: str = ""
    interrupted: bool = False
    server_died: bool = False

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def num_done(self) -> int:
        """Requests that have ended."""
        return sum(record.status is not Status.PENDING for record in self.records)


Monitor = Callable[[Run], str]
"""Called a few times a second; a non-empty answer stops the run and becomes ``Run.stopped``."""


class Runner:
    """Runs workloads against one client, one at a time.

    ``interrupt`` may be called at any time (it is what Ctrl-C does): the run in progress ends and keeps its records,
    and no later one starts.
    """

    def __init__(self, client: Client, *, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._stop = asyncio.Event()
        self.interrupted = False

    def interrupt(self) -> None:
        """End the run in progress and refuse to start another."""
        self.interrupted = True
        self._stop.set()

    async def unless_interrupted(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``, or None when ``interrupt`` was called before it ended; it is cancelled then."""
        task, stopping = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()

    async def open_loop(
        self, workload: Workload, prompt: Callable[[int, int], list[int] | str], monitor: Monitor
    ) -> Run:
        """Send each request at its arrival time. ``prompt(index, num_tokens)`` makes its prompt, just before."""
        assert workload.arrivals is not None
        arrivals = workload.arrivals.tolist()

        async def issue(run: Run, tasks: asyncio.TaskGroup) -> None:
            ready: deque[tuple[bytes, RequestRecord]] = deque()
            for index, due in enumerate(arrivals):
                # A long prompt takes milliseconds to make: made in idle time, a burst goes out at once.
                while len(ready) < _MADE_AHEAD and (ahead := index + len(ready)) < len(arrivals):
                    if ready and due - run.now < _IDLE_SECONDS:
                        break
                    ready.append(self._prepare(workload, prompt, ahead))
                    await asyncio.sleep(0)
                body, record = ready.popleft()
                record.scheduled = due
                # Also when late: the streams in progress must get their turn between two sends.
                await asyncio.sleep(max(due - run.now, 0))
                run.records.append(record)
                tasks.create_task(self._client.send(record, body, started=run.started, limit=self._timeout))

        return await self._run(Run(len(workload)), issue, monitor)

    async def closed_loop(
        self,
        workload: Workload,
        prompt: Callable[[int, int], list[int] | str],
        monitor: Monitor,
        *,
        num_clients: int,
        num_requests: int | None,
        duration: float | None,
    ) -> Run:
        """Keep ``num_clients`` requests in flight, up to ``num_requests`` in all or until ``duration`` seconds."""
        assert num_requests is not None or duration is not None
        indices = iter(range(num_requests)) if num_requests is not None else iter(range(2**62))

        async def client(run: Run) -> None:
            for index in indices:
                if duration is not None and run.now >= duration:
                    return
                body, record = self._prepare(workload, prompt, index)
                record.scheduled = run.now
                run.records.append(record)
                await self._client.send(record, body, started=run.started, limit=self._timeout)
                if record.status is Status.CANCELLED:
                    return
                if record.status is not Status.OK:
                    # A refusal comes back at once: do not hammer.
                    await asyncio.sleep(0.05)

        async def issue(run: Run, tasks: asyncio.TaskGroup) -> None:
            for _ in range(num_clients):
                tasks.create_task(client(run))

        return await self._run(Run(num_requests or 0), issue, monitor)

    def _prepare(
        self, workload: Workload, prompt: Callable[[int, int], list[int] | str], index: int
    ) -> tuple[bytes, RequestRecord]:
        row = index % len(workload)
        record = RequestRecord(index, 0.0, int(workload.prompt_lens[row]), int(workload.output_lens[row]))
        return self._client.target.body(prompt(index, record.prompt_len), record.output_len), record

    async def _run(self, run: Run, issue: Callable[[Run, asyncio.TaskGroup], Awaitable[None]], monitor: Monitor) -> Run:
        if self.interrupted:
            run.stopped, run.interrupted = "interrupted", True
            return run

        async def whole() -> None:
            async with asyncio.TaskGroup() as tasks:
                await issue(run, tasks)

        run.started = time.perf_counter()
        work = asyncio.create_task(whole())
        try:
            await self._watch(run, work, monitor)
        finally:
            # Ends the requests in flight, whose records then say so; a no-op on finished work, whose errors surface.
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        run.end = run.now
        for record in run.records:
            if record.status is Status.PENDING:
                record.status, record.end = Status.CANCELLED, run.end
        return run

    async def _watch(self, run: Run, work: "asyncio.Task[None]", monitor: Monitor) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while not work.done() and not run.stopped:
                await asyncio.wait((work, stopping), timeout=_MONITOR_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    run.stopped, run.interrupted = "interrupted", True
                elif _is_dead(run):
                    run.stopped, run.server_died = "the server no longer accepts connections", True
                elif not work.done():
                    run.stopped = monitor(run)
        finally:
            stopping.cancel()


def _is_dead(run: Run) -> bool:
    ended = sorted(
        (record for record in run.records[-1000:] if record.status is not Status.PENDING), key=lambda r: r.end
    )[-_DEAD_AFTER:]
    return len(ended) == _DEAD_AFTER and all(record.error.startswith(CANNOT_CONNECT) for record in ended)
