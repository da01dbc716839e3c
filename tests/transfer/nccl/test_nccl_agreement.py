"""The state machines of the NCCL transport, in any order of events: what must hold of every pair, whatever fails.

``world`` checks while it runs: no send without its receive; every pull ends once, by its deadline, and is not written
afterwards; no slot is given away that NCCL may use; generations only grow; no more communicators than allowed.
"""

import contextlib
import itertools
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.nccl import messages
from distserve.transfer.nccl.agreement import Arrived, Packed, Stop
from distserve.transfer.nccl.link import Phase
from distserve.transfer.nccl.messages import Decoder, encode
from distserve.transfer.nccl.pieces import cut
from distserve.transfer.nccl.room import Limits
from distserve.transfer.tcp_wire import Wanted
from tests.transfer.nccl.world import LAYOUT, LIMITS, STEP, World


def do_something(world: World, random: Random) -> None:
    """One of the things that may happen now; faults are the rarer ones."""
    sinks = [sink for sink in world.sinks if sink not in world.lost]
    under_way = sorted(world.deadline.keys() - world.ended.keys())
    actions = world.actions(faults=random.random() < 0.02)
    what = random.random()
    if what < 0.78 and actions:
        random.choice(actions)()
    elif what < 0.86 and sinks:
        blocks = random.randint(0, 7)
        seconds = random.choice([0, 1, 3, 20, 20, 20])
        world.pull(random.choice(sinks), blocks, random.randint(0, blocks), random.randint(1, 3), seconds)
    elif what < 0.88 and under_way:
        sink, number = random.choice(under_way)
        world.feed(sink, Stop(number, "cancelled"))
    elif what < 0.92:
        step = random.randrange(len(world.hubs)), random.randint(1, 3)
        world.passed[step] = max(world.passed[step], random.randint(0, 3))
    elif what < 0.97:
        world.pass_time()
    elif what < 0.98:
        world.num_to_hang = 1
    elif what < 0.998 and world.live:
        world.break_newest(random.choice(sorted(world.live))[0])
    elif sinks:
        world.lose(random.choice(sinks))


def run_out(world: World, seconds: float) -> None:
    """No more faults: what can happen does, and time passes."""
    end = world.now + seconds
    while world.now < end:
        while actions := world.actions(faults=False):
            actions[0]()
        world.pass_time()


@given(st.integers(), st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 2)]), st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_whatever_happens(seed, shape, num_events):
    world, random = World(*shape), Random(seed)
    for _ in range(num_events):
        do_something(world, random)
    run_out(world, 21.0)
    assert world.ended.keys() == world.deadline.keys()
    # Those that hung come back at last; nothing is left of anything.
    world.release()
    world.num_to_hang = 0
    run_out(world, 20.0)
    for hub in world.hubs:
        assert hub.outgoing.num_free == hub.incoming.num_free == LIMITS.num_slots
    # And the pairs are as good as new.
    for sink in [sink for sink in world.sinks if sink not in world.lost]:
        before = world.newest[sink]
        number = world.pull(sink, num_ready=4)
        run_out(world, 6.0)
        assert world.ended[sink, number].reason == ""
        assert world.newest[sink] >= before


def test_every_pair_gets_its_turn_with_fewer_communicators_than_pairs():
    world = World(1, 5)
    numbers = {sink: world.pull(sink, num_ready=4, seconds=30) for sink in world.sinks}
    run_out(world, 30)
    assert all(world.ended[key].reason == "" for key in numbers.items())
    assert len(world.hubs[0].seats) == LIMITS.max_communicators
    # The least recently used made way: the last two are still open.
    assert [link.phase for link in world.hubs[0].links.values()].count(Phase.OPEN) == 2


def test_a_communicator_is_kept_from_pull_to_pull():
    world = World(1, 1)
    for _ in range(3):
        world.pull(world.sinks[0], num_ready=4)
        run_out(world, 2)
    assert world.newest[world.sinks[0]] == 1
    assert len(world.ended) == 3


def test_a_pull_that_waits_for_a_step_holds_no_slot_and_launches_nothing():
    world = World(1, 1)
    number = world.pull(world.sinks[0], num_blocks=4, num_ready=0, step=7, seconds=60)
    run_out(world, 5)
    assert world.hubs[0].outgoing.num_free == LIMITS.num_slots
    assert not any(comm.receives for comm in world.comms.values())
    world.passed[0, 7] = 3
    run_out(world, 1)
    assert world.ended[world.sinks[0], number].reason == ""


def test_a_communicator_that_is_needed_makes_way_although_a_pull_waits_for_its_step():
    world = World(1, 3)
    first, second, third = world.sinks
    for sink in (first, second):
        world.pull(sink, num_ready=0, step=9, seconds=60)
    run_out(world, 1)
    number = world.pull(third, num_ready=4, seconds=10)
    run_out(world, 5)
    assert world.ended[third, number].reason == ""
    world.passed[0, 9] = 3
    run_out(world, 5)
    assert {key[0] for key in world.ended} == {first, second, third}
    assert all(ended.reason == "" for ended in world.ended.values())


def test_a_failed_generation_fails_what_was_on_its_way_and_nothing_else():
    world = World(1, 1)
    (sink,) = world.sinks
    moving, waiting = world.pull(sink, num_ready=4, seconds=20), world.pull(sink, num_ready=0, step=9, seconds=20)
    while not any(comm.receives for comm in world.comms.values()):
        world.actions(faults=False)[0]()
    world.break_newest(sink)
    assert world.ended[sink, moving].reason == "ordered"
    run_out(world, 5)
    world.passed[0, 9] = 3
    run_out(world, 5)
    assert world.ended[sink, waiting].reason == ""
    assert world.newest[sink] == 2


def test_what_was_announced_in_vain_is_announced_again_and_fetched_once():
    world = World(1, 1)
    (sink,) = world.sinks
    ring = world.hubs[1].incoming
    others = [ring.take() for _ in range(LIMITS.num_slots)]
    number = world.pull(sink, num_ready=4, seconds=20)
    run_out(world, 1)
    assert not any(comm.receives for comm in world.comms.values())
    world.break_newest(sink)
    for slot in others:
        ring.give(slot)
    run_out(world, 5)
    assert world.ended[sink, number].reason == ""
    assert world.newest[sink] == 2


def test_a_go_for_what_was_not_announced_ends_the_generation():
    world = World(1, 1)
    (sink,) = world.sinks
    source = world.peer[sink]
    world.pull(sink, num_ready=4)
    run_out(world, 2)
    world.pull(sink, num_ready=4)
    world.deliver(source)
    packing = next(event.op_id for _, event in world.answers if isinstance(event, Packed))
    num_sends = sum(len(comm.sends) for comm in world.comms.values())
    world.feed(source, Arrived(messages.Go(1, packing)))
    assert world.hubs[0].links[source[1]].phase is Phase.CLOSING
    assert sum(len(comm.sends) for comm in world.comms.values()) == num_sends


def test_a_silent_source_costs_its_sink_no_more_than_the_deadline():
    world = World(1, 1)
    (sink,) = world.sinks
    number = world.pull(sink, num_ready=4, seconds=3)
    for _ in range(8):
        world.pass_time()
    assert "deadline passed" in world.ended[sink, number].reason


def test_opening_is_tried_again_after_ever_longer_pauses():
    world = World(1, 1)
    (sink,) = world.sinks
    world.pull(sink, num_ready=4, seconds=30)
    opened = []
    while world.now < 120:
        for comm in tuple(world.comms.values()):
            if len(comm.ends) == 2 and not comm.is_broken:
                opened.append(world.now)
                world.open(comm, fails=True)
        if actions := world.actions(faults=False):
            actions[0]()
        else:
            world.pass_time()
    pauses = [later - earlier for earlier, later in itertools.pairwise(opened)]
    assert len(opened) > 4
    assert pauses[-1] > 2 > pauses[0]
    assert all(pause <= 5 + 2 * STEP for pause in pauses)


@given(
    st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 400)
)  # fmt: skip
def test_pieces_are_all_cells_once_and_of_the_size_promised(ready, late, num_layers, cell, min_bytes):
    pieces = cut(ready, ready + late, num_layers, cell, min_bytes)
    cells = [(b, layer, piece.follows_step) for piece in pieces for b in piece.blocks for layer in piece.layers]
    assert sorted(cells) == [(b, layer, b >= ready) for b in range(ready + late) for layer in range(num_layers)]
    for follows_step in (False, True):
        some = [piece for piece in pieces if piece.follows_step is follows_step]
        assert [piece.layers.start for piece in some] == sorted(piece.layers.start for piece in some)
        for piece in some:
            assert piece.num_bytes == len(piece.blocks) * len(piece.layers) * cell
            assert piece.num_bytes >= min_bytes or len(some) == 1
            assert piece.num_bytes < 3 * min_bytes or piece.num_bytes == cell


WANTED = Wanted(5, 1, range(3), range(1), (3, 1))
MESSAGES = [
    messages.Pull(1, 2.5, 100, WANTED),
    messages.Cancel(2),
    messages.Invite(3, bytes(range(128))),
    messages.Agree(3),
    messages.Ready(3, 4, 1, 0, 4096),
    messages.Go(3, 4),
    messages.End(1, "why"),
    messages.GiveUp(3, "because"),
    messages.Retire(3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@given(chunk=st.integers(1, 60))
def test_messages_arrive_as_they_were_sent(message, chunk):
    at_source = isinstance(message, messages.ToSource)
    decoder = Decoder(LAYOUT, at_source=at_source)
    frames = encode(message) * 3
    arrived = [one for start in range(0, len(frames), chunk) for one in decoder.feed(frames[start : start + chunk])]
    assert arrived == [message] * 3
    if type(message) not in {messages.GiveUp, messages.Retire}:
        with pytest.raises(TransferError, match="breaks the protocol"):
            list(Decoder(LAYOUT, at_source=not at_source).feed(frames))


@given(st.binary(max_size=80), st.booleans())
def test_nonsense_is_refused_and_never_more(received, at_source):
    with contextlib.suppress(TransferError):
        list(Decoder(LAYOUT, at_source=at_source).feed(received))


@pytest.mark.parametrize(("name", "value"), [("num_slots", 0), ("max_communicators", 0), ("grace", 0.0)])
def test_limits_that_cannot_work_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})
