"""The life of a rank that is not rank 0: load, then do what rank 0 says until it is gone."""

import logging
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from distserve.core.errors import ConfigError, UnsupportedModelError
from distserve.engine.group.messages import (
    Close,
    Done,
    Drawn,
    Failed,
    FromRank,
    Loaded,
    Open,
    RankPlan,
    Step,
    encode,
    receive_command,
)
from distserve.engine.group.shard_worker import ShardWorker
from distserve.engine.sharding.comm import PeerError

logger = logging.getLogger(__name__)


def rank_device(device: str, rank: int) -> torch.device:
    """Where rank ``rank`` computes if the instance's device is ``device`` (``cpu`` or ``cuda``)."""
    return torch.device(device, rank) if device == "cuda" else torch.device(device)


def make_worker(plan: RankPlan, rank: int) -> ShardWorker:
    """Load rank ``rank``'s part; raises what :class:`ShardWorker` does."""
    return ShardWorker(
        Path(plan.model_dir),
        dtype=plan.dtype,
        kv=plan.kv,
        parallel=plan.parallel,
        rank=rank,
        store_file=Path(plan.store_file),
        device=rank_device(plan.device, rank),
        timeout=plan.timeout,
    )


def run_rank(plan: RankPlan, rank: int, connection: Connection) -> int:
    """Serve rank ``rank``; returns the exit status of the process, which is its only thread."""
    torch.set_num_threads(plan.num_threads)
    try:
        worker = make_worker(plan, rank)
        _send(connection, Loaded())
        _serve(worker, connection)
    except EOFError:
        return os.EX_OK  # rank 0 is gone, and the instance with it
    except (ConfigError, PeerError) as error:
        _send(connection, Failed(_kind(error), str(error)))
        return os.EX_CONFIG
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported, and the process ends
        _send(connection, Failed(type(error).__name__, str(error), traceback.format_exc()))
        return os.EX_SOFTWARE
    raise AssertionError("a rank serves until rank 0 is gone")


def _serve(worker: ShardWorker, connection: Connection) -> None:
    while True:
        match receive_command(connection):
            case Open(command):
                worker.open(command)
            case Close(seq_id):
                worker.close(seq_id)
            case Step(step):
                done = worker.run(step)
                if done is not None:
                    _send(connection, Done(done))
            case Drawn(step_id, tokens):
                worker.record(step_id, tokens)


def _send(connection: Connection, report: FromRank) -> None:
    try:
        connection.send_bytes(encode(report))
    except BrokenPipeError as error:
        raise EOFError from error


def _kind(error: Exception) -> str:
    for kind in (UnsupportedModelError, ConfigError, PeerError):
        if isinstance(error, kind):
            return kind.__name__
    raise AssertionError
