"""The life of a rank that is not rank 0: load, then do what rank 0 says until it is gone."""

import logging
import os
import threading
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import Tensor

from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.core.events import StepDone, StepFailed
from distserve.engine.device.backend import Backend
from distserve.engine.device.start import backend_for
from distserve.engine.group.device_worker import DeviceShardWorker
from distserve.engine.group.memory import check_devices
from distserve.engine.group.memory_port import RankMemory
from distserve.engine.group.messages import (
    Ask,
    Close,
    Done,
    Drawn,
    Failed,
    FromRank,
    Loaded,
    Open,
    RankPlan,
    Step,
    Told,
    encode,
    receive_command,
)
from distserve.engine.group.shard_worker import ShardWorker
from distserve.engine.sharding.comm import PeerError
from distserve.engine.sharding.shard import shard_of_model

logger = logging.getLogger(__name__)


def rank_device(device: str, local_rank: int) -> torch.device:
    """Where the rank that is its node's ``local_rank``-th computes if the instance's device is ``cpu`` or ``cuda``."""
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def pin_rank(plan: RankPlan, rank: int) -> None:
    """Keep the calling thread, and those it will start, on rank ``rank``'s own CPUs, if it has any."""
    first = plan.local_rank(rank) * plan.num_threads
    own = plan.cores[first : first + plan.num_threads]
    if own:
        os.sched_setaffinity(0, own)


def make_worker(plan: RankPlan, rank: int, kv_buffer: Tensor | None = None) -> ShardWorker | DeviceShardWorker:
    """Load rank ``rank``'s part; raises what the two kinds of worker do."""
    backend = _backend(plan, rank)
    path = Path(plan.model_dir)
    if backend is None:
        return ShardWorker(
            path,
            dtype=plan.dtype,
            kv=plan.kv,
            parallel=plan.parallel,
            rank=rank,
            meeting=plan.meeting,
            timeout=plan.timeout,
            kv_buffer=kv_buffer,
        )
    if backend.device.type == "cuda":
        torch.cuda.set_device(backend.device)  # kernels start where the thread is
    return DeviceShardWorker(
        path,
        dtype=plan.dtype,
        kv=plan.kv,
        parallel=plan.parallel,
        rank=rank,
        meeting=plan.meeting,
        backend=backend,
        timeout=plan.timeout,
        kv_buffer=kv_buffer,
        max_batch_size=plan.max_batch_size,
    )


def _backend(plan: RankPlan, rank: int) -> Backend | None:
    """What rank ``rank`` computes on, unless that is the CPU."""
    if plan.backend:
        make: Callable[[int, str], Backend] = resolve_name(plan.backend)
        return make(plan.local_rank(rank), plan.backend_options)
    return backend_for(str(rank_device(plan.device, plan.local_rank(rank))))


def run_rank(plan: RankPlan, rank: int, connection: Connection) -> int:
    """Serve rank ``rank``; returns the exit status of the process, which is its only thread."""
    pin_rank(plan, rank)
    torch.set_num_threads(plan.num_threads)
    try:
        lock = threading.Lock()

        def report(message: FromRank) -> None:
            with lock:
                _send(connection, message)

        if rank == plan.ranks[0]:
            check_devices(plan.parallel, plan.device, plan.ranks)
        memory = make_memory(plan, rank, lambda answer: report(Told(answer)))
        worker = make_worker(plan, rank, None if memory is None else memory.pool)
        report(Loaded("" if memory is None else memory.address))
        _serve(worker, connection, memory, report)
    except EOFError:
        return os.EX_OK  # rank 0 is gone, and the instance with it
    except (ConfigError, PeerError) as error:
        _send(connection, Failed(_kind(error), str(error)))
        return os.EX_CONFIG
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported, and the process ends
        _send(connection, Failed(type(error).__name__, str(error), traceback.format_exc()))
        return os.EX_SOFTWARE
    raise AssertionError("a rank serves until rank 0 is gone")


def make_memory(plan: RankPlan, rank: int, tell: Callable[[bytes], None]) -> RankMemory | None:
    """The memory that ``plan`` names for rank ``rank``, if it names one."""
    if not plan.memory:
        return None
    kind: type[RankMemory] = resolve_name(plan.memory)
    shard = shard_of_model(Path(plan.model_dir), plan.parallel, rank)
    return kind(shard.layout(plan.kv, plan.dtype), shard, plan.local_rank(rank), plan.memory_options, tell)


def _serve(
    worker: ShardWorker | DeviceShardWorker,
    connection: Connection,
    memory: RankMemory | None,
    report: Callable[[FromRank], None],
) -> None:
    def on_done(outcome: StepDone | StepFailed) -> None:
        # A device that has failed does not recover: the instance ends, and says why.
        report(Done(outcome) if isinstance(outcome, StepDone) else Failed("StepFailed", outcome.reason))

    while True:
        match receive_command(connection):
            case Open(command):
                worker.open(command)
            case Close(seq_id):
                worker.close(seq_id)
            case Step(step):
                if memory is None:
                    worker.launch(step, on_done)
                    continue
                memory.begin_step(step.step_id)
                worker.launch(step, on_done, partial(memory.layer_done, step.step_id))
                memory.end_step(step.step_id)
            case Drawn(step_id, tokens):
                worker.record(step_id, tokens)
            case Ask(request):
                assert memory is not None
                memory.ask(request)


def _send(connection: Connection, report: FromRank) -> None:
    try:
        connection.send_bytes(encode(report))
    except OSError as error:
        raise EOFError from error


def _kind(error: Exception) -> str:
    for kind in (UnsupportedModelError, ConfigError, PeerError):
        if isinstance(error, kind):
            return kind.__name__
    raise AssertionError
