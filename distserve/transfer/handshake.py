"""How two ranks of one host meet: prove that they share the secret, compare versions and layouts, pass memory.

One Unix sequenced-packet connection in the abstract namespace, which leaves no file. Messages are single JSON packets:

1. server: protocol, nonce
2. client: protocol, nonce, layout, proof = HMAC-SHA256(secret, "pull" + both nonces)
3. server: layout, generation, proof = HMAC-SHA256(secret, "serve" + both nonces), with two descriptors; or an error

Afterwards nothing is sent; the connection stays open so that either side learns of the other's end at once. Both check
the peer's user id first, since abstract sockets carry no permissions.
"""

import hmac
import json
import os
import secrets
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.plan import layout_difference

PROTOCOL = 1
"""Version of the handshake and of the progress words; both sides must have the same."""

_MAX_PACKET = 4096
_PREFIX = "distserve-kv-"


@dataclass(frozen=True, slots=True)
class Offered:
    """What a server gave: descriptors (now the caller's to close) of its pool and its progress words."""

    layout: KvLayout
    generation: int
    pool_fd: int
    progress_fd: int


def listen() -> tuple[socket.socket, str]:
    """Return a listening socket and its address: a fresh random name in this network namespace."""
    address = _PREFIX + secrets.token_hex(16)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    server.bind("\0" + address)
    server.listen(64)
    return server, address


def serve(
    connection: socket.socket, secret: bytes, layout: KvLayout, generation: int, pool_fd: int, progress_fd: int
) -> None:
    """Server's side. Raises TransferError (after telling the client why) if the peer is refused."""
    _check_user(connection)
    nonce = secrets.token_hex(32)
    _send(connection, {"protocol": PROTOCOL, "nonce": nonce})
    hello = _receive(connection)
    # Phrased as the client reads it: "there" is this side.
    refusal: str | None
    if hello.get("protocol") != PROTOCOL:
        refusal = f"KV transfer protocol {PROTOCOL} there, {hello.get('protocol')} here"
    elif not _proves(hello, _proof(secret, "pull", nonce, str(hello.get("nonce")))):
        refusal = "the secrets differ: instances of different clusters?"
    elif (theirs := _layout(hello)) is None:
        refusal = "malformed KV layout"
    else:
        refusal = layout_difference(theirs, layout)
    if refusal is not None:
        _send(connection, {"error": refusal})
        raise TransferError(f"refused a peer, telling it: {refusal}")
    answer = {
        "layout": asdict(layout),
        "generation": generation,
        "proof": _proof(secret, "serve", nonce, str(hello["nonce"])),
    }
    socket.send_fds(connection, [json.dumps(answer).encode()], [pool_fd, progress_fd])


def dial(address: str, secret: bytes, layout: KvLayout, timeout: float) -> tuple[socket.socket, Offered]:
    """Client's side: the connection to keep open, and what the server gave.

    Raises TransferError if nobody answers within ``timeout`` seconds or the two do not fit.
    """
    if not address.startswith(_PREFIX):
        raise TransferError(f"{address!r} is not an address of shared KV memory")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout)
    try:
        connection.connect("\0" + address)
        offered = _greet(connection, secret, layout)
    except OSError as error:
        connection.close()
        raise TransferError(
            f"no KV memory to be reached at {address!r} on this host and network namespace: {error}"
        ) from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection, offered


def _greet(connection: socket.socket, secret: bytes, layout: KvLayout) -> Offered:
    _check_user(connection)
    challenge = _receive(connection)
    if challenge.get("protocol") != PROTOCOL:
        raise TransferError(f"KV transfer protocol {challenge.get('protocol')} there, {PROTOCOL} here")
    nonce, peer_nonce = secrets.token_hex(32), str(challenge.get("nonce"))
    _send(
        connection,
        {
            "protocol": PROTOCOL,
            "nonce": nonce,
            "layout": asdict(layout),
            "proof": _proof(secret, "pull", peer_nonce, nonce),
        },
    )
    answer, fds = _receive_fds(connection)
    try:
        theirs = _checked(answer, fds, _proof(secret, "serve", peer_nonce, nonce))
        return Offered(theirs, int(answer["generation"]), fds[0], fds[1])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _checked(answer: dict[str, Any], fds: list[int], proof: str) -> KvLayout:
    """Return the server's layout, or raise TransferError if the answer is a refusal or not to be trusted."""
    if "error" in answer:
        raise TransferError(f"the peer refused: {answer['error']}")
    if not _proves(answer, proof):
        raise TransferError("the peer does not know the secret")
    layout = _layout(answer)
    if layout is None or len(fds) != 2 or not isinstance(answer.get("generation"), int):
        raise TransferError("malformed answer of the peer")
    return layout


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        raise TransferError(f"the peer runs as user {uid}, not {os.geteuid()}")


def _proof(secret: bytes, role: str, server_nonce: str, client_nonce: str) -> str:
    return hmac.new(secret, f"{role}:{server_nonce}:{client_nonce}".encode(), "sha256").hexdigest()


def _proves(packet: dict[str, Any], proof: str) -> bool:
    return hmac.compare_digest(proof.encode(), str(packet.get("proof")).encode("utf-8", "replace"))


def _layout(packet: dict[str, Any]) -> KvLayout | None:
    try:
        layout = KvLayout(**packet["layout"])
    except (KeyError, TypeError):
        return None
    values = asdict(layout)
    is_sound = isinstance(values.pop("dtype"), str) and all(type(value) is int for value in values.values())
    return layout if is_sound else None


def _send(connection: socket.socket, packet: dict[str, Any]) -> None:
    connection.send(json.dumps(packet).encode())


def _receive(connection: socket.socket) -> dict[str, Any]:
    return _decode(connection.recv(_MAX_PACKET))


def _receive_fds(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, _MAX_PACKET, 2)
    try:
        return _decode(data), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _decode(data: bytes) -> dict[str, Any]:
    if not data:
        raise TransferError("the peer closed the connection during the handshake")
    try:
        packet = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TransferError("the peer does not speak the KV transfer protocol") from error
    if not isinstance(packet, dict):
        raise TransferError("the peer does not speak the KV transfer protocol")
    return packet
