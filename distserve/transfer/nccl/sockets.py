"""Communicators over TCP, through the memory of the hosts: for cards without NCCL between them, and for rehearsals.

They behave as NCCL's do where it matters: making one waits for the other rank, operations run in the order of their
launch and end later, an abort ends them from outside. An id is where its maker listens and a word that the other rank
has to say there; what follows is neither encrypted nor authenticated, as with NCCL.
"""

import hmac
import queue
import secrets
import socket
import struct
import threading
import time

import torch
from torch import Tensor

from distserve.core.errors import TransferError
from distserve.transfer.acceptor import hang_up
from distserve.transfer.nccl.device import Completion, CpuDevice, Device
from distserve.transfer.tcp_wire import Packets, prepare

_PATIENCE = 20.0
"""Seconds for the other rank to come."""
_WORD_PATIENCE = 1.0
"""Seconds for whoever has come to say the word: a stranger must not keep the other rank waiting."""
_LIFETIME = 60.0
"""Seconds after which nobody will come any more for an id: both ranks have given its generation up."""
_WORD_BYTES = 32
_PORT = struct.Struct("<H")
_OP = struct.Struct("<Q")


class SocketCollectives:
    """Implements :class:`~distserve.transfer.nccl.collectives.Collectives`, for two ranks with memory on ``device``.

    ``host`` is the interface to listen on, as the other rank reaches it.
    """

    version = "none but TCP"

    def __init__(self, device: Device | None = None, *, host: str = "127.0.0.1") -> None:
        self._device = device or CpuDevice()
        self._host = host
        self._lock = threading.Lock()
        # By id, with the time it was made.
        self._listening: dict[bytes, tuple[socket.socket, float]] = {}
        self._is_closed = False

    def unique_id(self) -> bytes:
        """Listen for the other rank."""
        try:
            family, _, _, _, where = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
            server = socket.create_server((str(where[0]), 0), family=family)
        except OSError as error:
            raise RuntimeError(f"cannot listen on {self._host!r}: {error}") from error
        word = secrets.token_bytes(_WORD_BYTES)
        unique_id = word + _PORT.pack(server.getsockname()[1]) + self._host.encode()
        now = time.monotonic()
        with self._lock:
            if self._is_closed:
                server.close()
                raise RuntimeError("closed: no communicators are made any more")
            for stale in [each for each, (_, made) in self._listening.items() if made + _LIFETIME < now]:
                self._listening.pop(stale)[0].close()
            self._listening[unique_id] = server, now
        return unique_id

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> "SocketCommunicator":
        """Meet the other rank; waits for it, for some seconds."""
        assert num_ranks == 2
        try:
            connection = self._accept(unique_id) if rank == 0 else _dial(unique_id)
            prepare(connection)
            connection.setblocking(True)
        except (OSError, struct.error) as error:
            raise RuntimeError(f"no communicator: {error}") from error
        return SocketCommunicator(connection, self._device)

    def close(self) -> None:
        """End the waits of those who make communicators that nobody has come for. No id is given any more."""
        with self._lock:
            self._is_closed = True
            servers = tuple(self._listening.values())
            self._listening.clear()
        for server, _ in servers:
            hang_up(server)
            server.close()

    def _accept(self, unique_id: bytes) -> socket.socket:
        with self._lock:
            if unique_id not in self._listening:
                raise RuntimeError("the id is not known here any more")
            server, _ = self._listening[unique_id]
        deadline = time.monotonic() + _PATIENCE
        try:
            while (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                connection, _ = server.accept()
                if _says_word(connection, unique_id[:_WORD_BYTES]):
                    return connection
                connection.close()
            raise TimeoutError("the other rank has not come")
        finally:
            with self._lock, server:
                self._listening.pop(unique_id, None)


def _dial(unique_id: bytes) -> socket.socket:
    (port,) = _PORT.unpack_from(unique_id, _WORD_BYTES)
    host = unique_id[_WORD_BYTES + _PORT.size :].decode("utf-8", "replace")
    connection = socket.create_connection((host, port), _PATIENCE)
    try:
        Packets(connection, time.monotonic() + _WORD_PATIENCE).send(unique_id[:_WORD_BYTES])
    except BaseException:
        connection.close()
        raise
    return connection


def _says_word(connection: socket.socket, word: bytes) -> bool:
    try:
        said = Packets(connection, time.monotonic() + _WORD_PATIENCE).receive()
    except (OSError, TransferError):
        return False
    return hmac.compare_digest(said, word)


class _Op:
    """An operation: bytes that go or come."""

    def __init__(self, memory: Tensor, *, sends: bool) -> None:
        self.memory = memory
        self.sends = sends
        self.has_ended = threading.Event()

    def query(self) -> bool:
        return self.has_ended.is_set()


class SocketCommunicator:
    """Implements :class:`~distserve.transfer.nccl.collectives.Communicator`; a thread of its own is its stream."""

    def __init__(self, connection: socket.socket, device: Device) -> None:
        self._connection = connection
        self._device = device
        self._ops: queue.SimpleQueue[_Op | None] = queue.SimpleQueue()
        # Guards the end of the queue: what is put behind it would never end, and whoever aborted waits for its end.
        self._lock = threading.Lock()
        self._is_over = False
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
        self.destroy()

    def destroy(self) -> None:
        """End the thread."""
        with self._lock:
            self._is_over = True
            self._ops.put(None)
        self._thread.join()

    def _launch(self, op: _Op) -> Completion:
        with self._lock:
            if self._is_over:
                raise RuntimeError("the communicator was ended")
            self._ops.put(op)
        return op

    def _run(self) -> None:
        self._device.bind()
        # Beside whatever the device computes: copies on its stream would wait for that.
        with self._connection, self._device.apart():
            while (op := self._ops.get()) is not None:
                # What cannot be done has ended too, as a kernel has that was aborted; ``check`` tells the difference.
                if not self._error:
                    self._error = self._done(op)
                op.has_ended.set()

    def _done(self, op: _Op) -> str:
        """Do it; returns why it failed."""
        try:
            if op.sends:
                self._send(op.memory)
            else:
                self._receive(op.memory)
        except OSError:
            return "the other rank is gone"
        except RuntimeError as error:
            return str(error)
        return ""

    def _send(self, memory: Tensor) -> None:
        self._connection.sendall(_OP.pack(memory.numel()))
        # On a CPU this is the memory itself.
        self._connection.sendall(memory.cpu().numpy().data)

    def _receive(self, memory: Tensor) -> None:
        num_bytes = memory.numel()
        head = self._connection.recv(_OP.size, socket.MSG_WAITALL)
        if len(head) < _OP.size:
            raise ConnectionError
        if _OP.unpack(head)[0] != num_bytes:
            raise RuntimeError(f"a receive of {num_bytes} bytes met a send of {_OP.unpack(head)[0]}")
        on_host = memory if memory.device.type == "cpu" else torch.empty(num_bytes, dtype=torch.uint8)
        if self._connection.recv_into(on_host.numpy().data, num_bytes, socket.MSG_WAITALL) < num_bytes:
            raise ConnectionError
        if on_host is not memory:
            # From pageable memory, so it has ended when this returns.
            memory.copy_(on_host)
