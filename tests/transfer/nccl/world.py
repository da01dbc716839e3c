"""Ranks without sockets, threads, devices or NCCL: hubs, and a world around them in which a test decides what is next.

Checks as it goes what must never be otherwise.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.config import KvLayout
from distserve.transfer.nccl import agreement as a
from distserve.transfer.nccl.hub import Hub
from distserve.transfer.nccl.messages import Decoder, encode
from distserve.transfer.nccl.pieces import Piece, cell_bytes, cut
from distserve.transfer.nccl.room import Limits
from distserve.transfer.tcp_wire import Wanted

LAYOUT = KvLayout(num_layers=3, num_blocks=8, block_size=2, num_kv_heads=1, head_dim=2, dtype="float32")
CELL = cell_bytes(LAYOUT, range(1))
LIMITS = Limits(
    min_piece_bytes=2 * CELL,
    num_slots=2,
    max_communicators=2,
    open_timeout=4.0,
    transfer_timeout=2.0,
    close_timeout=1.0,
    grace=1.0,
)
STEP = 0.5
"""Seconds by which time moves; whatever is due happens at most so much later."""

End = tuple[int, int]
"""A rank and a link of its hub."""
_MOVING = "NCCL may use it"


@dataclass
class Op:
    """One half of an operation that was launched."""

    end: End
    op_id: int
    slot: int
    num_bytes: int
    has_ended: bool = False


@dataclass
class Comm:
    """A communicator, seen from above. ``contents`` are what the sends found in their slots."""

    ends: dict[End, int] = field(default_factory=dict)
    is_open: bool = False
    is_broken: bool = False
    sends: list[Op] = field(default_factory=list)
    receives: list[Op] = field(default_factory=list)
    contents: list[object] = field(default_factory=list)


class World:
    """A link of every source rank with every sink rank."""

    def __init__(self, num_sources: int, num_sinks: int, limits: Limits = LIMITS) -> None:
        self.now = 100.0
        self.num_sources = num_sources
        self.passed: Counter[tuple[int, int]] = Counter()
        self.hubs = [
            Hub(LAYOUT, limits, lambda step, rank=rank: self.passed[rank, step])
            for rank in range(num_sources + num_sinks)
        ]
        self.peer: dict[End, End] = {}
        self.lost: set[End] = set()
        self.wires: dict[End, deque[bytes]] = defaultdict(deque)
        self.decoders: dict[End, Decoder] = {}
        self.answers: list[tuple[End, a.Event]] = []
        self.hung: list[tuple[End, a.Event]] = []
        self.num_to_hang = 0
        self.comms: dict[bytes, Comm] = {}
        self.ids: dict[tuple[End, int], bytes] = {}
        self.newest: Counter[End] = Counter()
        self.live: set[tuple[End, int]] = set()
        self.slots: dict[tuple[int, str, int], object] = {}
        self.deadline: dict[tuple[End, int], float] = {}
        self.pieces: dict[tuple[End, int], tuple[Piece, ...]] = {}
        self.written: dict[tuple[End, int], list[int]] = defaultdict(list)
        self.writing: Counter[tuple[End, int]] = Counter()
        self.writes: dict[tuple[End, int], tuple[End, int]] = {}
        self.ended: dict[tuple[End, int], a.Ended] = {}
        for source in range(num_sources):
            for sink in range(num_sources, num_sources + num_sinks):
                self.join(source, sink)

    @property
    def sinks(self) -> list[End]:
        return [end for end in self.peer if end[0] >= self.num_sources]

    def join(self, source: int, sink: int) -> End:
        here, there = (source, self.hubs[source].add_source()), (sink, self.hubs[sink].add_sink())
        self.peer[here], self.peer[there] = there, here
        return there

    # What a test does.

    def pull(self, sink: End, num_blocks: int = 4, num_ready: int = 2, step: int = 1, seconds: float = 6.0) -> int:
        number = sum(1 for end, _ in self.deadline if end == sink) + 1
        self.deadline[sink, number] = self.now + seconds
        pieces = self.pieces[sink, number] = cut(num_ready, num_blocks, 3, CELL, LIMITS.min_piece_bytes)
        wanted = Wanted(step, num_ready, range(3), range(1), tuple(range(num_blocks)))
        self.feed(sink, a.Begin(number, wanted, pieces, self.now + seconds))
        return number

    def pass_time(self) -> None:
        # Kernels that unpack take no time worth mentioning.
        for index in reversed([i for i, (_, event) in enumerate(self.answers) if isinstance(event, a.Unpacked)]):
            self.answer(index)
        self.now += STEP
        for rank, hub in enumerate(self.hubs):
            self.execute(rank, hub.tick(self.now))

    def deliver(self, end: End) -> None:
        decoder = self.decoders.setdefault(end, Decoder(LAYOUT, at_source=end[0] < self.num_sources))
        for message in decoder.feed(self.wires[end].popleft()):
            self.feed(end, a.Arrived(message))

    def answer(self, index: int) -> None:
        end, event = self.answers.pop(index)
        if isinstance(event, a.TornDown):
            self.live.remove((end, event.generation))
            for place, owner in tuple(self.slots.items()):
                if owner == (_MOVING, end, event.generation):
                    del self.slots[place]
        if isinstance(event, a.Unpacked):
            self.writing[self.writes.pop((end, event.op_id))] -= 1
        self.feed(end, event)

    def open(self, comm: Comm, *, fails: bool) -> None:
        comm.is_open, comm.is_broken = not fails, fails
        for end in comm.ends:
            generation = self._generation(end, comm)
            self.answers.append((end, a.Broken(generation, "ordered") if fails else a.Opened(generation)))

    def move(self, comm: Comm, side: str) -> None:
        """The oldest operation of a side ends, whose other half is there."""
        ops = getattr(comm, side)
        index = next(index for index, op in enumerate(ops) if not op.has_ended)
        op = ops[index]
        op.has_ended = True
        self.slots[op.end[0], side, op.slot] = comm.contents[index]
        self.feed(op.end, a.Moved(self._generation(op.end, comm), op.op_id))

    def break_newest(self, end: End) -> None:
        self.feed(end, a.Broken(self.newest[end], "ordered"))

    def lose(self, end: End) -> None:
        for one in (end, self.peer[end]):
            self.lost.add(one)
            self.wires[one].clear()
            self.feed(one, a.Lost("ordered"))

    def release(self) -> None:
        self.answers += self.hung
        self.hung = []

    def actions(self, *, faults: bool) -> list[Callable[[], object]]:
        """What may happen next, in any order."""
        found: list[Callable[[], object]] = []
        found += [lambda end=end: self.deliver(end) for end, wire in self.wires.items() if wire]
        found += [lambda index=index: self.answer(index) for index in range(len(self.answers))]
        for comm in self.comms.values():
            if len(comm.ends) == 2 and not comm.is_open and not comm.is_broken:
                found.append(lambda comm=comm: self.open(comm, fails=False))
                if faults:
                    found.append(lambda comm=comm: self.open(comm, fails=True))
            for side in ("sends", "receives"):
                num_ended = sum(op.has_ended for op in getattr(comm, side))
                if num_ended < min(len(comm.sends), len(comm.receives)) and not comm.is_broken:
                    found.append(lambda comm=comm, side=side: self.move(comm, side))
        return found

    # What the hubs do.

    def _generation(self, end: End, comm: Comm) -> int:
        return next(number for (one, number), name in self.ids.items() if one == end and self.comms[name] is comm)

    def feed(self, end: End, event: a.Event) -> None:
        rank, link_id = end
        if link_id in self.hubs[rank].links:
            self.execute(rank, self.hubs[rank].handle(self.now, link_id, event))

    def execute(self, rank: int, commands: list[tuple[int, a.Command]]) -> None:
        # Slots that were given back are nobody's; NCCL must be through with them.
        for (at, side, slot), owner in tuple(self.slots.items()):
            ring = self.hubs[at].outgoing if side == "sends" else self.hubs[at].incoming
            if slot in ring._free:
                assert owner[0] != _MOVING, "a slot is free that NCCL may use"
                del self.slots[at, side, slot]
        for link_id, command in commands:
            self.do((rank, link_id), command)
        hub = self.hubs[rank]
        num_live = sum(end[0] == rank for end, _ in self.live)
        assert num_live == len(hub.seats) <= hub.limits.max_communicators, "more communicators than there may be"

    def later(self, end: End, event: a.Event) -> None:
        hangs = self.num_to_hang > 0
        self.num_to_hang -= hangs
        (self.hung if hangs else self.answers).append((end, event))

    def do(self, end: End, command: a.Command) -> None:
        rank = end[0]
        match command:
            case a.Tell(message):
                if end not in self.lost:
                    self.wires[self.peer[end]].append(encode(message))
            case a.MakeId(generation):
                self.is_new(end, generation)
                self.later(end, a.Named(generation, f"{end}/{generation}".encode()))
            case a.Open(generation, name, as_rank):
                if as_rank == 1:
                    self.is_new(end, generation)
                self.ids[end, generation] = name
                ends = self.comms.setdefault(name, Comm()).ends
                assert as_rank not in ends.values()
                ends[end] = as_rank
            case a.Pack(op_id, slot, wanted, piece):
                assert not piece.follows_step or self.passed[rank, wanted.ready_step] >= piece.layers.stop
                assert not str(self.slots.get((rank, "sends", slot), "")).startswith(_MOVING)
                self.slots[rank, "sends", slot] = (end, op_id, piece)
                self.answers.append((end, a.Packed(op_id)))
            case a.Send(generation, op_id, slot, num_bytes):
                comm = self.comms[self.ids[end, generation]]
                assert comm.is_open
                assert len(comm.sends) < len(comm.receives), "a send without its receive"
                receive = comm.receives[len(comm.sends)]
                assert (receive.op_id, receive.num_bytes) == (op_id, num_bytes), "a send that meets another receive"
                comm.sends.append(Op(end, op_id, slot, num_bytes))
                content = self.slots[rank, "sends", slot]
                assert content[:2] == (end, op_id)
                comm.contents.append(content)
                self.slots[rank, "sends", slot] = (_MOVING, end, generation)
            case a.Receive(generation, op_id, slot, num_bytes):
                comm = self.comms[self.ids[end, generation]]
                assert comm.is_open
                self.slots[rank, "receives", slot] = (_MOVING, end, generation)
                comm.receives.append(Op(end, op_id, slot, num_bytes))
            case a.Unpack(op_id, slot, number, piece):
                assert (end, number) not in self.ended, "written after its end"
                assert self.slots[rank, "receives", slot] == (self.peer[end], op_id, piece), "other bytes"
                self.written[end, number].append(self.pieces[end, number].index(piece))
                self.writing[end, number] += 1
                self.writes[end, op_id] = (end, number)
                self.answers.append((end, a.Unpacked(op_id)))
            case a.Ended(number, reason, num_bytes):
                assert (end, number) not in self.ended, "ended twice"
                assert not self.writing[end, number], "ended while written"
                assert self.now <= self.deadline[end, number] + STEP, "ended too late"
                self.ended[end, number] = command
                if not reason:
                    pieces = self.pieces[end, number]
                    assert self.now <= self.deadline[end, number]
                    assert sorted(self.written[end, number]) == list(range(len(pieces)))
                    assert num_bytes == sum(piece.num_bytes for piece in pieces)
            case a.Abort(generation) | a.Abandon(generation) | a.Destroy(generation):
                if (comm := self.comms.get(self.ids.get((end, generation), b""))) is not None:
                    comm.is_broken = True
                if isinstance(command, a.Destroy):
                    assert (_MOVING, end, generation) not in self.slots.values(), "destroyed in use"
                self.later(end, a.TornDown(generation))

    def is_new(self, end: End, generation: int) -> None:
        assert generation > self.newest[end], "generations only grow"
        self.newest[end] = generation
        self.live.add((end, generation))
