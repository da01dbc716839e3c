"""Communicators between CPU tensors, over sockets of one host: stand in for NCCL in tests and rehearsals.

They behave as NCCL's do where it matters: making one waits for the other rank, operations run in the order of their
launch and end later, an abort ends them from outside. An id is the port that its maker listens on.
"""

import contextlib
import queue
import socket
import struct
import threading

from torch import Tensor

from distserve.transfer.acceptor import hang_up
from distserve.transfer.nccl.device import Completion

_ID = struct.Struct("<H")
_OP = struct.Struct("<Q")


class SocketCollectives:
    """Implements :class:`~distserve.transfer.nccl.collectives.Collectives`, for two ranks."""

    version = "sockets"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening: dict[bytes, socket.socket] = {}

    def unique_id(self) -> bytes:
        """Listen for the other rank."""
        server = socket.create_server(("127.0.0.1", 0))
        unique_id = _ID.pack(server.getsockname()[1])
        with self._lock:
            self._listening[unique_id] = server
        return unique_id

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> "SocketCommunicator":
        """Meet the other rank; waits for it, for ever."""
        assert num_ranks == 2
        try:
            if rank == 0:
                connection = self._accept(unique_id)
            else:
                connection = socket.create_connection(("127.0.0.1", *_ID.unpack(unique_id)))
        except OSError as error:
            raise RuntimeError(f"no communicator: {error}") from error
        return SocketCommunicator(connection)

    def close(self) -> None:
        """End the waits of those who make communicators that nobody has come for."""
        with self._lock:
            servers = tuple(self._listening.values())
            self._listening.clear()
        for server in servers:
            hang_up(server)
            server.close()

    def _accept(self, unique_id: bytes) -> socket.socket:
        with self._lock:
            server = self._listening.get(unique_id)
        if server is None:
            raise RuntimeError("the id is not known here any more")
        connection, _ = server.accept()
        with self._lock, server:
            self._listening.pop(unique_id, None)
        return connection


class _Op:
    """An operation: bytes that go or come."""

    def __init__(self, memory: Tensor, *, sends: bool) -> None:
        self.view = memory.numpy().data
        self.sends = sends
        self.has_ended = threading.Event()

    def query(self) -> bool:
        return self.has_ended.is_set()


class SocketCommunicator:
    """Implements :class:`~distserve.transfer.nccl.collectives.Communicator`; a thread of its own is its stream."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ops: queue.SimpleQueue[_Op | None] = queue.SimpleQueue()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="kv-sockets", daemon=True)
        self._thread.start()

    def send(self, memory: Tensor) -> Completion:
        """See :class:`~distserve.transfer.nccl.collectives.Communicator`, here and below."""
        return self._launch(_Op(memory, sends=True))

    def recv(self, memory: Tensor) -> Completion:
        """Queue it."""
        return self._launch(_Op(memory, sends=False))

    def check(self) -> None:
        """Whether the connection broke."""
        if self._error:
            raise RuntimeError(self._error)

    def abort(self) -> None:
        """Break it, and wait until the thread uses no memory any more."""
        hang_up(self._connection)
        self._ops.put(None)
        self._thread.join()

    def destroy(self) -> None:
        """End the thread."""
        self._ops.put(None)
        self._thread.join()

    def _launch(self, op: _Op) -> Completion:
        self._ops.put(op)
        return op

    def _run(self) -> None:
        with self._connection:
            while (op := self._ops.get()) is not None:
                # What cannot be done has ended too, as a kernel has that was aborted; ``check`` tells the difference.
                if not self._error:
                    self._error = self._done(op)
                op.has_ended.set()

    def _done(self, op: _Op) -> str:
        num_bytes = len(op.view)
        with contextlib.suppress(OSError):
            if op.sends:
                self._connection.sendall(_OP.pack(num_bytes))
                self._connection.sendall(op.view)
                return ""
            head = self._connection.recv(_OP.size, socket.MSG_WAITALL)
            if len(head) == _OP.size:
                if _OP.unpack(head)[0] != num_bytes:
                    return f"a receive of {num_bytes} bytes met a send of {_OP.unpack(head)[0]}"
                if self._connection.recv_into(op.view, num_bytes, socket.MSG_WAITALL) == num_bytes:
                    return ""
        return "the other rank is gone"
