"""Peers are connected when met, again when a connection was lost, and no more once they are gone."""

import threading
import time
from collections.abc import Iterator

import pytest

from distserve.cluster import kv_peers
from distserve.cluster.kv_peers import KvPeers
from distserve.core.errors import TransferError


class Network:
    """Peers that can be reached or not, and who is connected."""

    def __init__(self) -> None:
        self.unreachable: dict[str, TransferError] = {}
        self.connected: dict[str, str] = {}
        self.num_attempts = 0
        self.changed = threading.Condition()

    def connect(self, peer: str, address: str) -> None:
        with self.changed:
            self.num_attempts += 1
            self.changed.notify_all()
            if peer in self.unreachable:
                raise self.unreachable[peer]
            self.connected[peer] = address

    def forget(self, peer: str) -> None:
        with self.changed:
            self.connected.pop(peer, None)

    def wait_for_attempt(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_attempts >= number, timeout=10)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def peers(network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[KvPeers]:
    monkeypatch.setattr(kv_peers, "_FIRST_PAUSE", 0.02)
    peers = KvPeers("decode-0", network.connect, network.forget)
    yield peers
    peers.close()


def test_who_cannot_be_reached_is_said_and_tried_again_until_it_can(network: Network, peers: KvPeers) -> None:
    broken = TransferError("no KV memory to be reached at tcp://h:1")
    broken.__cause__ = TimeoutError("timed out")
    network.unreachable["prefill-1"] = broken
    (problem,) = peers.meet({"prefill-0": "a", "prefill-1": "b"})
    assert problem.startswith("decode-0 cannot pull KV from prefill-1: no KV memory to be reached at tcp://h:1")
    assert "--kv-interface" in problem
    assert network.connected == {"prefill-0": "a"}
    network.wait_for_attempt(4)
    network.unreachable.clear()
    tried = network.num_attempts
    network.wait_for_attempt(tried + 1)
    assert network.connected == {"prefill-0": "a", "prefill-1": "b"}


def test_a_peer_may_stay_away_for_long(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_peers, "_FIRST_PAUSE", 1e-6)
    monkeypatch.setattr(kv_peers, "_LONGEST_PAUSE", 1e-6)
    peers = KvPeers("decode-0", network.connect, network.forget)
    network.unreachable["prefill-0"] = TransferError("away")
    peers.meet({"prefill-0": "a"})
    network.wait_for_attempt(1_100)  # 2^1024 is no float
    network.unreachable.clear()
    network.wait_for_attempt(network.num_attempts + 1)
    peers.close()
    assert network.connected == {"prefill-0": "a"}


def test_advice_on_networks_is_given_where_the_network_is_at_fault(network: Network, peers: KvPeers) -> None:
    network.unreachable["prefill-0"] = TransferError("block_size 32 there, 16 here")
    (problem,) = peers.meet({"prefill-0": "a"})
    assert problem == "decode-0 cannot pull KV from prefill-0: block_size 32 there, 16 here"


def test_a_lost_connection_is_made_anew_once(network: Network, peers: KvPeers) -> None:
    began = time.monotonic()
    peers.meet({"prefill-0": "a"})
    later = time.monotonic()
    # Pulls over the former connection that fail because there is a newer one are no reason for a third.
    peers.lost("prefill-0", began)
    for _ in range(5):
        peers.lost("prefill-0", later)
    network.wait_for_attempt(2)
    peers.lost("prefill-0", later)
    time.sleep(0.1)
    assert network.num_attempts == 2


def test_who_is_gone_is_let_go_of_and_not_tried_again(network: Network, peers: KvPeers) -> None:
    peers.meet({"prefill-0": "a"})
    peers.lost("prefill-0", time.monotonic())
    peers.forget("prefill-0")
    assert network.connected == {}
    time.sleep(0.1)
    assert network.num_attempts == 1


def test_who_is_met_twice_at_once_is_connected_once(network: Network) -> None:
    connecting, go_on = threading.Event(), threading.Event()

    def slowly(peer: str, address: str) -> None:
        connecting.set()
        assert go_on.wait(5)
        network.connect(peer, address)

    peers = KvPeers("decode-0", slowly, network.forget)
    meetings = [threading.Thread(target=peers.meet, args=({"prefill-0": "a"},)) for _ in range(3)]
    meetings[0].start()
    assert connecting.wait(5)
    for meeting in meetings[1:]:
        meeting.start()
    time.sleep(0.1)  # so that they want what is under way
    go_on.set()
    for meeting in meetings:
        meeting.join()
    assert (network.connected, network.num_attempts) == ({"prefill-0": "a"}, 1)
    peers.meet({"prefill-0": "b"})
    assert (network.connected, network.num_attempts) == ({"prefill-0": "b"}, 2)
    peers.close()


def test_who_goes_while_being_connected_is_let_go_of(network: Network) -> None:
    connecting = threading.Event()

    def slowly(peer: str, address: str) -> None:
        connecting.set()
        time.sleep(0.1)
        network.connect(peer, address)

    peers = KvPeers("decode-0", slowly, network.forget)
    meeting = threading.Thread(target=peers.meet, args=({"prefill-0": "a"},))
    meeting.start()
    assert connecting.wait(5)
    peers.forget("prefill-0")
    meeting.join()
    assert network.connected == {}
    peers.close()
