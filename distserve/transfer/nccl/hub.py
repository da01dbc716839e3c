"""All pairs of a rank: whose turn it is for the slots and the seats they share. Pure."""

from distserve.core.config import KvLayout
from distserve.transfer.nccl.agreement import Command, Event, Evict, Tick
from distserve.transfer.nccl.inbound import Inbound
from distserve.transfer.nccl.link import Link, Phase
from distserve.transfer.nccl.outbound import LayersPassed, Outbound
from distserve.transfer.nccl.room import Limits, Ring, Seats

Commands = list[tuple[int, Command]]
"""Each with the link it is of."""


class Hub:
    """The links of a rank with ``layout``, by number. Links are added when ranks meet, and dropped when all is over."""

    def __init__(self, layout: KvLayout, limits: Limits, layers_passed: LayersPassed) -> None:
        self.limits = limits
        self.links: dict[int, Link] = {}
        self.seats = Seats(limits.max_communicators)
        self.outgoing = Ring(limits.num_slots)
        self.incoming = Ring(limits.num_slots)
        self._layout = layout
        self._layers_passed = layers_passed
        self._num_links = 0

    def add_source(self) -> int:
        """This rank is the source of a new link."""
        shared = self.outgoing, self.seats, self.limits
        return self._add(Outbound(self._num_links, self._layout, *shared, self._layers_passed))

    def add_sink(self) -> int:
        """This rank is the destination of a new link."""
        return self._add(Inbound(self._num_links, self.incoming, self.seats, self.limits))

    def handle(self, now: float, link_id: int, event: Event) -> Commands:
        """Take in what happened to a link, and let all others see whether it is their turn now."""
        commands = [(link_id, command) for command in self.links[link_id].handle(now, event)]
        return commands + self.tick(now)

    def tick(self, now: float) -> Commands:
        """Time has passed. To be called at least as often as deadlines are to be kept, while :attr:`is_busy`."""
        commands: Commands = []
        for link_id, link in tuple(self.links.items()):
            if link.is_busy:
                commands += [(link_id, command) for command in link.handle(now, Tick())]
        commands += self._make_room(now)
        for link_id, link in tuple(self.links.items()):
            if link.is_finished:
                del self.links[link_id]
        # Who was served first now is last next time.
        if self.links:
            first = next(iter(self.links))
            self.links[first] = self.links.pop(first)
        return commands

    @property
    def is_busy(self) -> bool:
        """Whether anything depends on the time or on progress."""
        return any(link.is_busy for link in self.links.values())

    def layers_missing(self) -> int | None:
        """The fewest layers of this rank's step that any pull waits for; None if none does."""
        missing = [link.layers_missing() for link in self.links.values() if isinstance(link, Outbound)]
        return min((fewest for fewest in missing if fewest is not None), default=None)

    def _make_room(self, now: float) -> Commands:
        """Retire the communicator that has been idle for the longest, if another one is needed in its place."""
        if not self.seats.is_full or not any(link.needs_seat for link in self.links.values()):
            return []
        if any(link.phase in {Phase.RETIRING, Phase.CLOSING} for link in self.links.values()):
            return []
        for link_id, generation in self.seats.by_use:
            link = self.links[link_id]
            if link.generation == generation and link.may_make_way(now):
                return [(link_id, command) for command in link.handle(now, Evict())]
        return []

    def _add(self, link: Link) -> int:
        self.links[link.link_id] = link
        self._num_links += 1
        return link.link_id
