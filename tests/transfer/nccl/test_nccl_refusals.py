"""What the NCCL transport does not start with, or does not connect to, and what it says."""

import time

import pytest
import torch

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.nccl import cupy_nccl
from distserve.transfer.nccl.device import CudaDevice
from distserve.transfer.nccl.transport import NcclTransport
from distserve.transfer.tcp import TcpTransport
from tests.transfer.pools import LAYOUT, SECRET


def test_versions_of_nccl_and_secrets_that_differ_are_refused(start, source):
    rank = start()
    rank.transport._bootstrap._version = "1.2.4"
    with pytest.raises(TransferError, match=r"NCCL 1\.2\.3 there, 1\.2\.4 here"):
        rank.transport.connect("source", source.transport.address)
    with pytest.raises(TransferError, match="secret"):
        start(secret=b"another").transport.connect("source", source.transport.address)


def test_a_rank_that_does_not_use_nccl_is_refused(source):
    tcp = TcpTransport(LAYOUT, host="127.0.0.1", secret=SECRET, clock=time.time)
    try:
        with pytest.raises(TransferError, match="not the address of a rank that uses NCCL"):
            source.transport.connect("tcp", tcp.address)
    finally:
        tcp.close()


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    pool = torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"CuPy, which is not installed: .*\.\[cuda\]"):
        NcclTransport(LAYOUT, pool, host="127.0.0.1", secret=SECRET, clock=time.time)


def test_two_copies_of_nccl_in_a_process_are_noticed():
    maps = "\n".join(
        f"7f00-7f01 r-xp 0 08:01 {number} {path}"
        for number, path in enumerate(
            [
                "/a/nvidia/nccl/lib/libnccl.so.2",
                "/a/nvidia/nccl/lib/libnccl.so.2",
                "/usr/lib/libc.so.6",
                "/b/libnccl.so.2.1",
            ]
        )
    )
    assert cupy_nccl.loaded_libraries(maps) == ["/a/nvidia/nccl/lib/libnccl.so.2", "/b/libnccl.so.2.1"]
    assert cupy_nccl.loaded_libraries() == []


def test_a_pool_of_another_size_or_device_is_refused(monkeypatch):
    pool = torch.zeros(LAYOUT.num_bytes + 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=f"{LAYOUT.num_bytes} bytes"):
        NcclTransport(LAYOUT, pool, host="127.0.0.1", secret=SECRET, clock=time.time)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            CudaDevice(torch.device("cuda"))
