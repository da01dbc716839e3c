"""How two ranks meet: prove that they share the secret, compare versions and layouts. Knows no sockets.

Messages are single JSON packets, on whatever carries them:

1. server: protocol, nonce
2. client: protocol, nonce, the server's name, the layout that the server must have, and
   proof = HMAC-SHA256(secret, "pull" + both nonces)
3. server: layout, generation, proof = HMAC-SHA256(secret, "serve" + both nonces); or an error

Layouts may differ in ``num_blocks``. A server's name is the random part of its address, so that a peer which comes to
an address that was reused since is told so.
"""

import hmac
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.plan import layout_difference

PROTOCOL = 1
"""Version of the greeting, the progress words and the frames on a wire; both sides must have the same."""
MAX_PACKET = 4096
"""Bytes; a longer packet is not one of these."""


class Packets(Protocol):
    """What carries the greeting. Its methods raise OSError, and TransferError for what is no packet."""

    def send(self, packet: bytes) -> None:
        """Send one packet."""
        ...

    def receive(self) -> bytes:
        """Return the next packet; empty if the peer has closed."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said of itself."""

    layout: KvLayout
    generation: int


def answer_of(layout: KvLayout, generation: int, secret: bytes, nonces: tuple[str, str]) -> bytes:
    """The server's last packet."""
    proof = _proof(secret, "serve", *nonces)
    return json.dumps({"layout": asdict(layout), "generation": generation, "proof": proof}).encode()


def examine(packets: Packets, secret: bytes, name: str, layout: KvLayout) -> tuple[str, str]:
    """Server's side, up to its last packet: the nonces to answer with.

    Raises TransferError (after telling the client why) if the peer is refused.
    """
    nonce = secrets.token_hex(32)
    packets.send(json.dumps({"protocol": PROTOCOL, "nonce": nonce}).encode())
    hello = decode(packets.receive())
    peer_nonce = str(hello.get("nonce"))
    # Phrased as the client reads it: "there" is this side.
    refusal: str | None
    if hello.get("protocol") != PROTOCOL:
        refusal = f"KV transfer protocol {PROTOCOL} there, {hello.get('protocol')} here"
    elif not _proves(hello, _proof(secret, "pull", nonce, peer_nonce)):
        refusal = "the secrets differ: instances of different clusters?"
    elif hello.get("name") != name:
        refusal = "the address is that of a rank which is gone; another one has it now"
    elif (theirs := _layout(hello)) is None:
        refusal = "malformed KV layout"
    else:
        refusal = layout_difference(theirs, layout)
    if refusal is not None:
        packets.send(json.dumps({"error": refusal}).encode())
        raise TransferError(f"refused a peer, telling it: {refusal}")
    return nonce, peer_nonce


def introduce(packets: Packets, secret: bytes, name: str, expected: KvLayout) -> Callable[[bytes], Answer]:
    """Client's side, up to the server's last packet: returns what turns that packet into an Answer or TransferError."""
    challenge = decode(packets.receive())
    if challenge.get("protocol") != PROTOCOL:
        raise TransferError(f"KV transfer protocol {challenge.get('protocol')} there, {PROTOCOL} here")
    nonce, peer_nonce = secrets.token_hex(32), str(challenge.get("nonce"))
    hello = {
        "protocol": PROTOCOL,
        "nonce": nonce,
        "name": name,
        "layout": asdict(expected),
        "proof": _proof(secret, "pull", peer_nonce, nonce),
    }
    packets.send(json.dumps(hello).encode())
    proof = _proof(secret, "serve", peer_nonce, nonce)
    return lambda packet: _checked(decode(packet), proof, expected)


def decode(packet: bytes) -> dict[str, Any]:
    """Return a packet's object; raises TransferError if it has none."""
    if not packet:
        raise TransferError("the peer closed the connection during the handshake")
    try:
        decoded = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise TransferError("the peer does not speak the KV transfer protocol") from error
    if not isinstance(decoded, dict):
        raise TransferError("the peer does not speak the KV transfer protocol")
    return decoded


def _checked(packet: dict[str, Any], proof: str, expected: KvLayout) -> Answer:
    """Return the server's answer, or raise TransferError if it is a refusal or not to be trusted."""
    if "error" in packet:
        raise TransferError(f"the peer refused: {packet['error']}")
    if not _proves(packet, proof):
        raise TransferError("the peer does not know the secret")
    layout, generation = _layout(packet), packet.get("generation")
    if layout is None or type(generation) is not int:
        raise TransferError("malformed answer of the peer")
    if (difference := layout_difference(expected, layout)) is not None:
        raise TransferError(difference)
    return Answer(layout, generation)


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
