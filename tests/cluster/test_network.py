"""Mailboxes deliver in order, never block, and speak only to holders of the cluster's key."""

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from distserve.cluster.network import Mailbox, ReceiverThread, create_key
from distserve.cluster.parts import ClusterKey
from distserve.cluster.wire import EVENTS
from distserve.core.errors import ConfigError
from distserve.core.events import Received, Timer
from distserve.core.messages import Abort, Hello, Prefill
from distserve.core.request import Request, SamplingParams

KEY = create_key()


@pytest.fixture
def make() -> Iterator[Callable[[str, ClusterKey], Mailbox]]:
    mailboxes: list[Mailbox] = []

    def build(name: str, key: ClusterKey = KEY) -> Mailbox:
        mailboxes.append(Mailbox(name, key))
        return mailboxes[-1]

    yield build
    for mailbox in mailboxes:
        mailbox.close()


def receive(mailbox: Mailbox, count: int, timeout: float = 10.0) -> list[Received]:
    received: list[Received] = []
    end = time.monotonic() + timeout
    while len(received) < count and time.monotonic() < end:
        if mailbox.wait(0.05):
            received += mailbox.drain(1000)
    return received


def test_messages_arrive_in_order_with_their_sender(make: Callable[..., Mailbox]) -> None:
    alice, bob = make("alice"), make("bob")
    alice.meet({"bob": bob.endpoint})
    for number in range(500):
        alice.send("bob", Abort(("r", number)))
    assert receive(bob, 500) == [Received("alice", Abort(("r", number))) for number in range(500)]


def test_a_long_prompt_crosses(make: Callable[..., Mailbox]) -> None:
    alice, bob = make("alice"), make("bob")
    alice.meet({"bob": bob.endpoint})
    prompt = list(range(200_000))
    alice.send("bob", Prefill(Request("r", "alice", prompt, SamplingParams(1))))
    (received,) = receive(bob, 1)
    assert isinstance(received.message, Prefill)
    assert list(received.message.request.prompt_token_ids) == prompt


def test_unknown_and_forgotten_peers_cost_nothing(
    make: Callable[..., Mailbox], caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = make("alice"), make("bob")
    with caplog.at_level(logging.INFO):
        alice.send("nobody", Hello())
    assert alice.num_dropped == 1
    assert "nobody" in caplog.text
    alice.meet({"bob": bob.endpoint})
    alice.send("bob", Hello())
    assert len(receive(bob, 1)) == 1
    alice.forget("bob")
    alice.send("bob", Hello())
    assert alice.num_dropped == 2


def test_a_dead_peer_never_blocks_its_sender(make: Callable[..., Mailbox], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.cluster.network.HIGH_WATER_MARK", 100)
    alice = make("alice")
    gone = Mailbox("gone", KEY)
    alice.meet({"gone": gone.endpoint})
    gone.close()
    for _ in range(1000):
        alice.send("gone", Hello())
    assert alice.num_dropped >= 800


@pytest.mark.parametrize("stranger", ["another key", "no key", "another secret"])
def test_strangers_are_not_heard(make: Callable[..., Mailbox], stranger: str) -> None:
    bob = make("bob")
    other = create_key()
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.linger = 0
    if stranger != "no key":
        socket.curve_publickey = other.public.encode()
        socket.curve_secretkey = other.secret.encode()
        socket.curve_serverkey = (KEY if stranger == "another key" else other).public.encode()
    socket.connect(bob.endpoint)
    socket.send(EVENTS.encode(Received("mallory", Hello())), zmq.DONTWAIT)
    assert receive(bob, 1, timeout=0.5) == []
    socket.close()
    context.term()
    alice = make("alice")
    alice.meet({"bob": bob.endpoint})
    alice.send("bob", Hello())
    assert receive(bob, 1) == [Received("alice", Hello())]


def test_malformed_messages_are_ignored(make: Callable[..., Mailbox], caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = make("alice"), make("bob")
    alice.meet({"bob": bob.endpoint})
    alice.send("bob", Hello())
    socket = alice._outboxes["bob"]
    for data in (b"", b"noise", EVENTS.encode(Timer())):
        socket.send(data)
    alice.send("bob", Hello())
    assert len(receive(bob, 2)) == 2
    assert "malformed" in caplog.text
    assert "Timer" in caplog.text


def test_the_receiver_thread_feeds_until_closed(make: Callable[..., Mailbox]) -> None:
    alice, bob = make("alice"), make("bob")
    fed: list[Received] = []
    thread = ReceiverThread(bob, fed.append)
    thread.start()
    alice.meet({"bob": bob.endpoint})
    for _ in range(10):
        alice.send("bob", Hello())
    end = time.monotonic() + 10
    while len(fed) < 10 and time.monotonic() < end:
        time.sleep(0.01)
    thread.close()
    alice.send("bob", Hello())
    assert receive(bob, 1) == [Received("alice", Hello())]
    assert len(fed) == 10


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1"):
        Mailbox("x", KEY, host="203.0.113.1")
