"""What the pairs of a rank share: slots of a staging ring, and seats for communicators. Pure."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from distserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and deadlines of the transport; seconds and bytes.

    ``min_piece_bytes``: a piece has at least so many, or is the only one; both ends of a pair use the destination's.
    A ring has ``num_slots`` slots of three times that; the transport has one for what it sends and one for what it
    receives. ``max_communicators``: of this rank, with those that hang. ``open_timeout`` is for making one, from the
    invitation on, ``transfer_timeout`` for a piece from GO on, ``close_timeout`` for aborting or destroying.
    ``grace`` is how much longer than its destination a source believes in a pull. Raises ConfigError for what cannot
    work.
    """

    min_piece_bytes: int = 16 << 20
    num_slots: int = 4
    max_communicators: int = 16
    open_timeout: float = 20.0
    transfer_timeout: float = 5.0
    close_timeout: float = 5.0
    grace: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_piece_bytes", "num_slots", "max_communicators"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("open_timeout", "transfer_timeout", "close_timeout", "grace"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds, not {getattr(self, name)}")


class Ring:
    """Slots of a staging buffer, by number; a slot is somebody's from :meth:`take` to :meth:`give`."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self) -> int | None:
        """A slot; None if there is none."""
        return self._free.pop(0) if self._free else None

    def give(self, slot: int) -> None:
        """The slot is free: nothing on the device reads or writes it any more."""
        assert slot not in self._free, f"slot {slot} is free already"
        self._free.append(slot)


class Seat(NamedTuple):
    """A communicator's name within a rank: the link it is of, and its generation."""

    link_id: int
    generation: int


class Seats:
    """The communicators that exist, are being made, or have not ended yet, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: OrderedDict[Seat, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, seat: Seat) -> bool:
        return seat in self._taken

    @property
    def is_full(self) -> bool:
        """Whether :meth:`take` would say no."""
        return len(self._taken) >= self.capacity

    @property
    def by_use(self) -> tuple[Seat, ...]:
        """Least recently used first."""
        return tuple(self._taken)

    def take(self, seat: Seat) -> bool:
        """Have the seat, if there is room."""
        assert seat not in self._taken, f"{seat} is taken"
        if self.is_full:
            return False
        self._taken[seat] = None
        return True

    def use(self, seat: Seat) -> None:
        """The communicator did something."""
        self._taken.move_to_end(seat)

    def leave(self, seat: Seat) -> None:
        """The communicator is gone."""
        del self._taken[seat]
