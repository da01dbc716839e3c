"""The source side that transports share: a pool, where peers find it, and how far its step is."""

import mmap

from distserve.core.config import KvLayout
from distserve.transfer.progress import SourceProgress


class SourceSide:
    """Half of :class:`~distserve.transfer.transport.Transport`; a transport's constructor sets the attributes."""

    _layout: KvLayout
    _pool: mmap.mmap
    _address: str
    _progress: SourceProgress

    @property
    def layout(self) -> KvLayout:
        """See :class:`~distserve.transfer.transport.Transport`, here and below."""
        return self._layout

    @property
    def buffer(self) -> memoryview:
        """The pool."""
        return memoryview(self._pool)

    @property
    def address(self) -> str:
        """Where peers find the pool."""
        return self._address

    def begin_step(self, step_id: int) -> None:
        """Publish that a step starts."""
        self._progress.begin_step(step_id)

    def layer_done(self, step_id: int, layer: int) -> None:
        """Publish that a layer is complete."""
        self._progress.layer_done(step_id, layer)

    def end_step(self, step_id: int) -> None:
        """Publish that a step is complete."""
        self._progress.end_step(step_id)
