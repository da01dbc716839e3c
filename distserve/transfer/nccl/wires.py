"""The control connections of a rank, one for each link, and a bell for the thread that waits on them."""

import contextlib
import selectors
import socket
from collections.abc import Iterator

from distserve.core.errors import TransferError
from distserve.transfer.nccl.agreement import Arrived, Lost
from distserve.transfer.nccl.control import Control
from distserve.transfer.nccl.messages import Message

Ready = list[tuple[int, int]]
"""Links whose connections can be read or written, and which of it."""


class Wires:
    """Methods are for one thread, but for :meth:`ring`. A connection that has broken is closed at once."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, Control]] = {}
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        for end in (self._bell, self._button):
            end.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)

    def ring(self) -> None:
        """End a wait, now or the next one."""
        # Full: it is ringing. Closed: nobody waits any more.
        with contextlib.suppress(OSError):
            self._button.send(b"\0")

    def wait(self, timeout: float | None) -> Ready:
        """Until the bell rings, something can be read or written, or ``timeout`` seconds have passed."""
        ready = self._selector.select(timeout)
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
        return [(key.data, events) for key, events in ready if key.data is not None]

    def add(self, link_id: int, name: str, control: Control) -> None:
        """The connection of a link; ``name`` is what people call the other end."""
        self._open[link_id] = name, control
        self._selector.register(control.connection, selectors.EVENT_READ, link_id)

    def tell(self, link_id: int, message: Message) -> Lost | None:
        """Send, now or when there is room; returns why the other end is lost, if it is. A no-op once hung up."""
        if link_id not in self._open:
            return None
        _, control = self._open[link_id]
        try:
            control.send(message)
        except (OSError, TransferError) as error:
            return self._lose(link_id, error)
        self._watch(link_id)
        return None

    def serve(self, link_id: int, events: int) -> Iterator[Arrived | Lost]:
        """Write what there is room for, and read what has arrived; nonsense, or an end, is the end of the link."""
        if link_id not in self._open:
            return
        _, control = self._open[link_id]
        try:
            if events & selectors.EVENT_WRITE:
                control.flush()
            if events & selectors.EVENT_READ:
                yield from map(Arrived, control.read())
        except (OSError, EOFError, TransferError) as error:
            if link_id in self._open:
                yield self._lose(link_id, error)
        self._watch(link_id)

    def hang_up(self, link_id: int) -> None:
        """Close a connection. A no-op if that has been done."""
        if link_id in self._open:
            _, control = self._open.pop(link_id)
            self._selector.unregister(control.connection)
            control.connection.close()

    def close(self) -> None:
        """Hang up on everyone."""
        for link_id in tuple(self._open):
            self.hang_up(link_id)
        self._selector.close()
        self._bell.close()
        self._button.close()

    def _lose(self, link_id: int, error: Exception) -> Lost:
        name, _ = self._open[link_id]
        self.hang_up(link_id)
        if isinstance(error, EOFError):
            return Lost(f"{name} closed its connection")
        return Lost(f"{name} is not reachable any more: {error}")

    def _watch(self, link_id: int) -> None:
        if link_id in self._open:
            _, control = self._open[link_id]
            interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if control.has_more else 0)
            if self._selector.get_key(control.connection).events != interest:
                self._selector.modify(control.connection, interest, link_id)
