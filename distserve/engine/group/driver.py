"""Rank 0's side of an instance of several ranks: it runs its own part of every step and drives the others.

Commands go to every rank in one order; the rank that draws the tokens answers, and the tokens go out to all with the
next command. So a step costs each rank one message and the instance no wait but that for its own result.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.errors import ConfigError, InstanceError, UnsupportedModelError
from distserve.core.events import StepDone, StepFailed
from distserve.engine.description import describe_config, load_config
from distserve.engine.group.memory import check_devices, check_memory
from distserve.engine.group.messages import (
    Ask,
    Close,
    Done,
    Drawn,
    Failed,
    Loaded,
    Open,
    RankPlan,
    Step,
    Told,
    ToRank,
    encode,
    receive_ended,
    receive_report,
)
from distserve.engine.group.processes import Crew, RankProcesses, describe_status
from distserve.engine.group.rank import make_worker, rank_device
from distserve.engine.kv import check_dtype
from distserve.engine.sharding.comm import PeerError
from distserve.engine.sharding.meeting import LOOPBACK, FileStore, HostedStore, Meeting
from distserve.engine.sharding.shard import shard_of

_GRACE = 1.0
"""Seconds after the first sign of a loss in which its cause may still come in: a rank whose peer has died often says
so before the kernel says that the peer has."""

_CAUSE, _CONSEQUENCE, _SILENT = range(3)
"""How much a sign of a loss explains, the best first."""

Loss = InstanceError | ConfigError
"""Why an instance has no use any more."""


class RankGroup:
    """An instance's ranks as one engine.

    :meth:`launch` starts a step and returns when rank 0's own part is done; ``on_done`` is told the outcome, from
    another thread where another rank draws the tokens. Up to ``parallel.pp`` steps may be on their way, of different
    sequences; on GPUs and with one stage any number, also of the same ones (:attr:`runs_ahead`). Methods are for one
    thread.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        parallel: ParallelConfig,
        kv: KvConfig,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
        timeout: float = 300.0,
        cores: Sequence[int] = (),
        on_lost: Callable[[Loss], None] | None = None,
        kv_buffer: Tensor | None = None,
        memory: str = "",
        memory_options: bytes = b"",
        on_told: Callable[[int, bytes], None] | None = None,
        away: Sequence[Crew] = (),
        host: str = LOOPBACK,
        max_batch_size: int = 64,
        backend: str = "",
        backend_options: str = "",
    ) -> None:
        """Start the ranks and load the model on all of them.

        Args:
            model_dir: a Hugging Face directory.
            parallel: the instance's shape.
            kv: blocks of the KV pool, the same on every rank.
            dtype: of weights, activations and KV.
            device: where to compute: ``cpu``, or ``cuda``, of which a node's n-th rank takes device n.
            num_threads: threads that compute, per rank.
            timeout: seconds that a rank waits for one that is alive but silent.
            cores: CPUs for the ranks of this node, ``num_threads`` for each in order; the calling thread is on rank 0's
                already. Without any the operating system chooses.
            on_lost: told, once and from another thread, when the instance has lost a rank, with the cause.
            kv_buffer: rank 0's KV memory; None allocates it.
            memory: the class that the other ranks keep theirs in (see :class:`RankPlan`).
            memory_options: what it is made with.
            on_told: told, from another thread, what the memory of a rank says.
            away: ranks on other nodes, which have come (:class:`distserve.engine.group.away.Muster`); they end with
                the group.
            host: where rank 0's node is reached from theirs.
            max_batch_size: on GPUs, the largest decode batch that graphs are captured for; 0 captures none.
            backend: what ranks compute on as on GPUs, in place of ``device``: a rehearsal's (see :class:`RankPlan`).
            backend_options: what that is made with.

        Raises:
            ConfigError: the model directory is damaged, or the shape does not divide the model.
            ConfigError: there is no room for weights and KV; says how much is missing.
            UnsupportedModelError: the model cannot be served exactly, or only by one rank.
            InstanceError: a rank died while loading; says which, and of what.
        """
        check_dtype(dtype, on_cpu=device == "cpu")
        path = Path(model_dir)
        config = load_config(path)
        self.description = describe_config(config, path)
        elsewhere = {rank for crew in away for rank in crew.ranks}
        here = tuple(rank for rank in range(parallel.num_ranks) if rank not in elsewhere)
        # A wrong shape, or one without room, is refused before anything is started here.
        try:
            first = shard_of(self.description, config.num_attention_heads, parallel, 0)
            check_devices(parallel, device, here)
            check_memory(self.description, first, kv, dtype, rank_device(device, 0), here, has_kv=kv_buffer is not None)
        except ConfigError:
            for crew in away:
                crew.close()
            raise
        self.parallel = parallel
        self._on_lost = on_lost
        self._on_told = on_told
        self.addresses: dict[int, str] = {}
        self._send_lock = threading.Lock()
        self._waiting: dict[int, Callable[[StepDone | StepFailed], None]] = {}
        self.runs_ahead = parallel.pp == 1 and (device != "cpu" or bool(backend))
        """Whether a step may be launched before the tokens that it continues are known to the host."""
        self._drawn: list[Drawn] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self._lost: Loss | None = None
        self._ended = threading.Event()
        self._all_loaded = threading.Event()
        if parallel.num_ranks == 1:
            self._all_loaded.set()
        self._own = contextlib.ExitStack()
        # A file is given up once all have met, so that a process that is killed later leaves nothing; a store that is
        # served is asked by NCCL later too.
        self._store = HostedStore(host) if away else FileStore()
        meeting = Meeting(self._store.address, host if away else LOOPBACK)
        plan = RankPlan(
            model_dir=str(path),
            dtype=dtype,
            kv=kv,
            parallel=parallel,
            ranks=here,
            meeting=meeting,
            device=device,
            num_threads=num_threads,
            timeout=timeout,
            cores=tuple(cores),
            memory=memory,
            memory_options=memory_options,
            max_batch_size=max_batch_size,
            backend=backend,
            backend_options=backend_options,
        )
        torch.set_num_threads(num_threads)
        try:
            self._processes = RankProcesses(plan, away)
        except BaseException:
            self._store.close()
            raise
        self._reader = threading.Thread(target=self._read, name="ranks", daemon=True)
        self._reader.start()
        try:
            self._worker = make_worker(plan, 0, kv_buffer)
            self._own.callback(self._worker.shutdown)
            self._all_loaded.wait()
            self.check()
            if not away:
                self._store.close()
        except PeerError as error:
            raise self._cause(error) from error
        except BaseException:
            self.shutdown()
            raise

    @property
    def layout(self) -> KvLayout:
        """Shape and type of rank 0's KV pool."""
        return self._worker.layout

    def open(self, command: OpenSequence) -> None:
        """Take a sequence on."""
        self._tell(Open(command))
        self._worker.open(command)

    def close(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._tell(Close(seq_id))
        self._worker.close(seq_id)

    def launch(
        self,
        step: RunStep,
        on_done: Callable[[StepDone | StepFailed], None],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Start a step; ``on_layer(l)`` is called once the KV of rank 0's layer l is in its pool.

        Raises:
            InstanceError: a rank is lost, with the cause; ``on_done`` of steps on their way are then never called.
        """
        self.check()
        with self._lock:
            drawn, self._drawn = self._drawn, []
            self._waiting[step.step_id] = on_done
        for tokens in drawn:
            self._tell(tokens)
            self._worker.record(tokens.step_id, tokens.tokens)
        self._tell(Step(step))
        try:
            self._worker.launch(step, self._finish, on_layer)
        except PeerError as error:
            raise self._cause(error) from error

    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone:
        """Launch a step and wait for its outcome.

        Raises:
            InstanceError: a rank is lost, with the cause.
        """
        outcome: list[StepDone | StepFailed] = []
        finished = threading.Event()

        def on_done(done: StepDone | StepFailed) -> None:
            outcome.append(done)
            finished.set()

        self.launch(step, on_done, on_layer)
        while not finished.wait(0.05):
            self.check()
        if isinstance(outcome[0], StepFailed):
            raise InstanceError(f"rank 0 failed: {outcome[0].reason}")
        return outcome[0]

    def shutdown(self) -> None:
        """End all other ranks. May be called twice, and from ``on_lost``."""
        self._is_closed = True
        self._own.close()
        self._processes.kill()
        self._store.close()
        if threading.current_thread() is not self._reader:
            self._reader.join()
            self._processes.release()

    def _tell(self, message: ToRank) -> None:
        data = encode(message)
        try:
            with self._send_lock:
                for end in self._processes.ranks.values():
                    end.send_bytes(data)
        except OSError as error:
            raise self._cause(error) from error

    def ask(self, rank: int, request: bytes) -> None:
        """Have the memory of ``rank`` (not 0) do something. From any thread; lost with the rank."""
        with self._send_lock, contextlib.suppress(OSError):
            self._processes.ranks[rank].send_bytes(encode(Ask(request)))

    def _finish(self, done: StepDone | StepFailed) -> None:
        with self._lock:
            if isinstance(done, StepDone) and not self.runs_ahead:
                self._drawn.append(Drawn(done.step_id, done.tokens))
            on_done = self._waiting.pop(done.step_id)
        on_done(done)

    def check(self) -> None:
        """Raise why the instance has lost a rank, if it has.

        Raises:
            InstanceError: the cause.
            ConfigError: the cause, if the user's.
        """
        if self._lost is not None:
            raise self._lost

    def _cause(self, error: Exception) -> Loss:
        """Why a rank is gone, as soon as that is known."""
        self._ended.wait(2 * _GRACE)
        self.shutdown()
        return self._lost or InstanceError(f"a rank of the instance is gone: {error}")

    def _read(self) -> None:
        """What the other ranks say, until the instance is closed or one of them is gone."""
        processes = self._processes
        ranks = {end: rank for rank, end in processes.ranks.items()}
        signs: list[tuple[int, Loss]] = []
        deadline: float | None = None
        ends: list[Connection] = [*processes.nurseries, *ranks]
        while ends and not self._is_closed and (deadline is None or time.monotonic() < deadline):
            try:
                ready = wait(ends, None if deadline is None else max(0.0, deadline - time.monotonic()))
            except (OSError, ValueError):
                break  # closed under the wait: the instance is being closed
            for end in ready:
                assert isinstance(end, Connection)
                try:
                    sign = self._take_report(end, ranks[end]) if end in ranks else self._take_ended(end)
                except (EOFError, OSError):
                    ends.remove(end)
                    what = f"rank {ranks[end]}" if end in ranks else "a process that started ranks"
                    sign = (_SILENT, InstanceError(f"{what} is gone"))
                if sign is not None:
                    signs.append(sign)
                    deadline = deadline or time.monotonic() + _GRACE
            if any(weight == _CAUSE for weight, _ in signs):
                break
        if signs and not self._is_closed:
            self._give_up(min(signs, key=lambda sign: sign[0])[1])

    def _take_report(self, end: Connection, rank: int) -> tuple[int, Loss] | None:
        match receive_report(end):
            case Told(answer):
                assert self._on_told is not None
                self._on_told(rank, answer)
            case Loaded(address):
                self.addresses[rank] = address
                if len(self.addresses) == self.parallel.num_ranks - 1:
                    self._all_loaded.set()
            case Done(done):
                self._finish(done)
            case Failed("UnsupportedModelError", reason):
                return (_CAUSE, UnsupportedModelError(reason))
            case Failed("ConfigError", reason):
                return (_CAUSE, ConfigError(reason))
            case Failed("PeerError", reason):
                return (_CONSEQUENCE, InstanceError(f"rank {rank} lost another rank: {reason}"))
            case Failed(kind, reason, trace):
                return (_CAUSE, InstanceError(f"rank {rank} failed: {kind}: {reason}\n{trace}"))
        return None

    def _take_ended(self, nursery: Connection) -> tuple[int, Loss] | None:
        ended = receive_ended(nursery)
        error = InstanceError(f"rank {ended.rank} {describe_status(ended.status)}")
        # A rank that ends by itself has said why; one that is killed has not.
        return (_CAUSE if ended.status < 0 else _SILENT, error)

    def _give_up(self, error: Loss) -> None:
        self._processes.kill()
        # Where rank 0 waits for the others to come, or to load, this ends the wait.
        self._store.end()
        if self._on_lost is not None and self._all_loaded.is_set():
            self._on_lost(error)
        # Last, so that whoever sees the error finds the instance ended and everyone told.
        self._lost = error
        self._ended.set()
        self._all_loaded.set()
