"""Which backend the ranks of an instance speak through, and what is asked for before they do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.engine.group.memory import check_devices
from distserve.engine.group.rank import rank_device
from distserve.engine.sharding import comm
from distserve.engine.sharding.comm import Communicator, make_group
from distserve.engine.sharding.meeting import LOOPBACK, FileStore, HostedStore, Meeting
from distserve.engine.sharding.shard import Shard


def test_ranks_on_gpus_speak_through_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, timedelta]] = []

    class Nccl:
        class Options:
            _timeout = timedelta(0)

        def __init__(self, _: Any, rank: int, size: int, options: Options) -> None:
            made.append((rank, size, options._timeout))

    monkeypatch.setattr(comm.c10d, "ProcessGroupNCCL", Nccl, raising=False)
    shard = Shard(ParallelConfig(4, 2), 6, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=16)
    store = distributed.FileStore(str(tmp_path / "store"), 8)
    for other in {*range(8)} - {6}:
        store.set(f"here-{other}", b"")
    Communicator(shard, Meeting(str(tmp_path / "store")), device=rank_device("cuda", 6), timeout=7.0)
    # Shard 2 of 4 in its stage, stage 1 of 2 among its neighbours.
    assert made == [(2, 4, timedelta(seconds=7)), (1, 2, timedelta(seconds=7))]


def test_ranks_on_cpus_speak_through_gloo(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    group = make_group(store, 0, 1, torch.device("cpu"), 30.0)
    tensor = torch.arange(3.0)
    group.allreduce([tensor]).wait()
    assert tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize("make_store", [FileStore, partial(HostedStore, LOOPBACK)], ids=["one node", "several"])
def test_who_waits_for_a_rank_that_is_lost_is_told(make_store: Callable[[], FileStore | HostedStore]) -> None:
    store = make_store()
    meeting = Meeting(store.address)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: meeting.attend(rank, 2, 60.0), range(2))
        loaded = [pool.submit(rank.wait_for_all, "loaded") for rank in (first, second)]
        assert [each.result(20) for each in loaded] == [None, None]
        waiting = pool.submit(first.wait_for_all, "tried out")
        store.end()
        with pytest.raises(RuntimeError, match="another rank is lost"):
            waiting.result(20)
        # Nor does it help that all had come.
        with pytest.raises(RuntimeError, match="another rank is lost"):
            second.wait_for_all("loaded")
    store.close()
    store.end()
    store.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_group_on_a_gpu(tmp_path: Path) -> None:
    device = rank_device("cuda", 0)
    torch.cuda.set_device(device)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    group = make_group(store, 0, 1, device, 30.0)
    assert isinstance(group, distributed.ProcessGroupNCCL)
    tensor, gathered = torch.arange(3.0, device=device), torch.empty(3, device=device)
    group.allreduce([tensor]).wait()
    group.allgather([[gathered]], [tensor]).wait()
    assert gathered.tolist() == [0, 1, 2]


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert [rank_device("cuda", rank) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert rank_device("cpu", 3) == torch.device("cpu")


@pytest.mark.parametrize(
    ("is_available", "count", "has_nccl", "message"),
    [
        (False, 0, True, "torch finds no CUDA device"),
        (True, 3, True, "tp 2 and pp 2 needs 4 GPUs here, one for each rank; this process sees 3"),
        (True, 4, False, "NCCL, which this build of torch lacks"),
    ],
)
def test_what_a_group_on_gpus_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, is_available: bool, count: int, has_nccl: bool, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: has_nccl)
    check_devices(ParallelConfig(2, 2), "cpu", range(4))
    with pytest.raises(ConfigError, match=message):
        check_devices(ParallelConfig(2, 2), "cuda", range(4))
