"""The order in which the bytes of a pull travel, and how long to wait for more of them. Pure.

Blocks that are ready go first, all planes of them; the others follow plane by plane as the source's step completes
layers. Both ends of a wire hold a :class:`Stream` of the same pull, and so agree on every byte's place.
"""

from dataclasses import dataclass

from distserve.core.errors import TransferError
from distserve.transfer.plan import Pieces, portions


@dataclass(frozen=True, slots=True)
class Batch:
    """``pieces`` of each of ``planes``, which are counted from the first that the pull moves."""

    pieces: Pieces
    planes: range
    plane_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all its planes."""
        return self.plane_bytes * len(self.planes)


class Stream:
    """Batches of at most ``max_bytes``, in order: whole planes of pieces, or a portion of one plane."""

    def __init__(self, ready: Pieces, late: Pieces, num_layers: int, max_bytes: int) -> None:
        self._end = 2 * num_layers
        self._phases = [_Phase(pieces, max_bytes) for pieces in (ready, late)]
        # Where the next batch starts; at plane ``_end`` of the last phase there is none.
        self._phase = self._plane = self._portion = 0
        if not self._phases[0].plane_bytes:
            self._end_phase()

    @property
    def num_bytes(self) -> int:
        """Bytes of all batches."""
        return sum(phase.plane_bytes for phase in self._phases) * self._end

    @property
    def is_done(self) -> bool:
        """Whether all batches were taken."""
        return self._phase == len(self._phases)

    @property
    def waits(self) -> bool:
        """Whether what comes next follows the source's step."""
        return self._phase == 1

    def next(self, num_layers_passed: int) -> Batch | None:
        """Take the next batch; None while it is a layer that the source has not passed. Not to be called when done."""
        end = min(2 * num_layers_passed, self._end) if self.waits else self._end
        if self._plane >= end:
            return None
        return self._take(range(self._plane, min(self._plane + self._phases[self._phase].planes_per_batch, end)))

    def take(self, num_planes: int) -> Batch:
        """Take the next batch as the other end cut it; raises TransferError if it cannot be one of ``num_planes``."""
        if self.is_done or not 1 <= num_planes <= self._phases[self._phase].planes_per_batch:
            raise TransferError(f"{num_planes} planes at once are not what was asked for")
        if self._plane + num_planes > self._end:
            raise TransferError(f"{num_planes} planes from plane {self._plane} are more than was asked for")
        return self._take(range(self._plane, self._plane + num_planes))

    def _take(self, planes: range) -> Batch:
        phase = self._phases[self._phase]
        pieces, num_bytes = phase.portions[self._portion]
        self._portion += 1
        if self._portion == len(phase.portions):
            self._portion, self._plane = 0, planes.stop
            if self._plane == self._end:
                self._end_phase()
        return Batch(pieces, planes, num_bytes)

    def _end_phase(self) -> None:
        self._plane = 0
        self._phase += 1
        if self._phase == 1 and not self._phases[1].plane_bytes:
            self._phase = 2


class _Phase:
    """Blocks that travel together, cut into batches."""

    __slots__ = ("plane_bytes", "planes_per_batch", "portions")

    def __init__(self, pieces: Pieces, max_bytes: int) -> None:
        self.portions = [(portion, int(portion[:, 2].sum())) for portion in portions(pieces, max_bytes)]
        self.plane_bytes = sum(num_bytes for _, num_bytes in self.portions)
        self.planes_per_batch = max(1, max_bytes // max(self.plane_bytes, 1))


@dataclass(frozen=True, slots=True)
class _Patience:
    """The pause before the next look at a source: a share of the time since something moved, within bounds (s)."""

    share: float
    shortest: float
    longest: float

    def pause(self, waited: float) -> float:
        return min(max(waited * self.share, self.shortest), self.longest)


_UNDER_WAY = _Patience(share=1 / 2, shortest=100e-6, longest=4e-3)
"""While several layers are missing: nothing waits for the one, only the last counts."""
_LAST_LAYER = _Patience(share=1 / 8, shortest=50e-6, longest=500e-6)
"""While one is missing: what this adds is time until the first decode step."""


def pause(num_layers_missing: int, waited: float) -> float:
    """Seconds to the next look at a source's progress, ``waited`` seconds after something moved.

    ``num_layers_missing`` is the fewest of any pull that waits.
    """
    return (_LAST_LAYER if num_layers_missing <= 1 else _UNDER_WAY).pause(waited)
