"""Communicators over TCP: who may come, how long the other rank is waited for, and memory of a card."""

import socket
import struct
import threading

import pytest
import torch

from distserve.transfer.nccl import sockets
from distserve.transfer.nccl.device import device_of
from distserve.transfer.nccl.sockets import SocketCollectives
from tests.transfer.pools import eventually


def meet(ours, theirs, while_waiting=lambda unique_id: None):
    """Both ends of a communicator."""
    unique_id = ours.unique_id()
    made = {}

    def make(collectives, rank):
        made[rank] = collectives.communicator(unique_id, rank)

    first = threading.Thread(target=make, args=(ours, 0))
    first.start()
    while_waiting(unique_id)
    make(theirs, 1)
    first.join(20)
    return made[0], made[1]


def moves(one, other, num_bytes=1 << 20, device="cpu") -> bool:
    sent = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).to(device)
    arrived = torch.zeros_like(sent)
    operations = one.send(sent), other.recv(arrived)
    assert eventually(lambda: all(operation.query() for operation in operations))
    for end in (one, other):
        end.check()
    return torch.equal(sent, arrived)


def test_a_stranger_is_not_let_in_and_does_not_keep_the_rank_out():
    strangers = []

    def come(unique_id):
        (port,) = struct.unpack_from("<H", unique_id, 32)
        for said in (b"", struct.pack("<I", 32) + bytes(32)):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(said)
            strangers.append(stranger)

    one, other = meet(SocketCollectives(), SocketCollectives(), come)
    assert moves(one, other)
    assert moves(other, one)
    for stranger in strangers:
        stranger.settimeout(20)
        assert stranger.recv(1) == b""
        stranger.close()
    for end in (one, other):
        end.destroy()


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(sockets, "_PATIENCE", 0.1)
    collectives = SocketCollectives()
    unique_id = collectives.unique_id()
    with pytest.raises(RuntimeError, match="no communicator: timed out"):
        collectives.communicator(unique_id, 0)
    with pytest.raises(RuntimeError, match="not known here any more"):
        collectives.communicator(unique_id, 0)
    with pytest.raises(RuntimeError, match=r"no communicator: .*refused"):
        SocketCollectives().communicator(unique_id, 1)


def test_an_id_that_nobody_used_keeps_no_port(monkeypatch):
    monkeypatch.setattr(sockets, "_LIFETIME", 0.0)
    collectives = SocketCollectives()
    stale = collectives.unique_id()
    collectives.unique_id()
    with pytest.raises(RuntimeError, match="not known here any more"):
        collectives.communicator(stale, 0)
    with pytest.raises(RuntimeError, match="refused"):
        SocketCollectives().communicator(stale, 1)
    collectives.close()
    with pytest.raises(RuntimeError, match="closed"):
        collectives.unique_id()


def test_what_is_no_id_and_no_interface_is_refused():
    with pytest.raises(RuntimeError, match="no communicator"):
        SocketCollectives().communicator(b"short", 1)
    with pytest.raises(RuntimeError, match=r"cannot listen on '203\.0\.113\.7'"):
        SocketCollectives(host="203.0.113.7").unique_id()


def test_the_other_rank_is_gone():
    one, other = meet(SocketCollectives(), SocketCollectives())
    receiving = one.recv(torch.zeros(64, dtype=torch.uint8))
    other.abort()
    assert eventually(receiving.query)
    with pytest.raises(RuntimeError, match="the other rank is gone"):
        one.check()
    one.abort()


@pytest.mark.parametrize("end", ["abort", "destroy"])
def test_nothing_is_launched_on_what_was_ended(end):
    """An operation that never ends would keep its memory for ever: an abort may overtake the thread that launches."""
    one, other = meet(SocketCollectives(), SocketCollectives())
    getattr(one, end)()
    for launch in (one.send, one.recv):
        with pytest.raises(RuntimeError, match="ended"):
            launch(torch.zeros(64, dtype=torch.uint8))
    other.abort()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_card_goes_through_the_host():
    device = device_of(torch.zeros(1, device="cuda"))
    one, other = meet(SocketCollectives(device), SocketCollectives(device))
    assert moves(one, other, 48 << 20, "cuda")
    for end in (one, other):
        end.destroy()
