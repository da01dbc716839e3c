"""An event loop on a thread of its own with a cluster in it, so that callers need none and may have one.

Knows nothing of prompts: it starts a cluster, runs coroutines beside it and ends both.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from distserve.cluster.local import LocalCluster
from distserve.cluster.owner_backend import OwnerBackend

T = TypeVar("T")


class Background:
    """Runs ``cluster`` until :meth:`close`; returns from construction once its instances serve.

    Raises ConfigError and its kin when the cluster cannot start; nothing is left running then.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="distserve-llm")
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._loop.run_forever, name="distserve-llm", daemon=True)
        self._thread.start()
        try:
            self.backend: OwnerBackend = self.run(cluster.__aenter__())
        except BaseException:
            self._end()
            raise

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin ``work`` on the loop. Safe to call from any thread; cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` on the loop and wait for it, from any other thread; an interrupt cancels it."""
        future = self.spawn(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Stop the cluster; whatever still waits for it is told so (503)."""
        if threading.current_thread() is self._thread:
            # The last reference to whoever owns this was a coroutine's: the loop cannot wait for its own end.
            threading.Thread(target=self.close, name="distserve-llm-close").start()
            return
        self.run(self._close_backend())
        # On this thread: once the interpreter is ending, executors take no work.
        self._cluster.close()
        self._end()

    def _end(self) -> None:
        self.run(self._cancel_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._executor.shutdown()

    async def _close_backend(self) -> None:
        self.backend.close()

    async def _cancel_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
