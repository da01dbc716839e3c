"""Typed bytes for everything the core exchanges: messages, events and commands as msgpack, never pickle.

A value is encoded as ``[tag, fields]``, where ``tag`` is the name of its class and ``fields`` its dataclass fields.
Only the classes of the core's unions can be decoded, each by a decoder that checks field types, so bytes from outside
cannot become anything else. Sequences of token ids come back as lists or tuples, whichever the annotation allows.

This module knows the core's vocabulary and nothing of sockets.
"""

from collections.abc import Iterable
from typing import Any, Final, get_args

import msgspec

from distserve.core.commands import Command, Send
from distserve.core.events import Event, Received
from distserve.core.messages import Message

_MESSAGES: Final[tuple[type, ...]] = get_args(Message)


class WireError(ValueError):
    """Bytes that are no encoding of the expected kind of value."""


class _Tagged(msgspec.Struct, array_like=True, frozen=True):
    """Outer shape of every encoded value; the fields stay raw until the tag has chosen their decoder."""

    tag: str
    fields: msgspec.Raw


class _Routed(msgspec.Struct, array_like=True, frozen=True):
    """Fields of a class that carries a message beside a name (:class:`Send`, :class:`Received`)."""

    party: str
    message: _Tagged


class Codec:
    """Encodes and decodes the values of one closed set of dataclasses.

    Args:
        types: The classes accepted. ``Send`` and ``Received`` carry a message, which is encoded within.
    """

    def __init__(self, types: Iterable[type]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._outer = msgspec.msgpack.Decoder(_Tagged)
        self._routed = msgspec.msgpack.Decoder(_Routed)
        wrapped = (*types, *_MESSAGES)
        self._types = frozenset(types)
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
            kind.__name__: msgspec.msgpack.Decoder(kind) for kind in wrapped if kind not in {Send, Received}
        }
        self._accepted = frozenset(kind.__name__ for kind in self._types)

    def encode(self, value: object) -> bytes:
        """Bytes of ``value``, which must be of one of the codec's types."""
        assert type(value) in self._types, f"{type(value).__name__} does not belong on this wire"
        return self._encoder.encode(self._tagged(value))

    def decode(self, data: bytes | memoryview) -> Any:
        """The value that ``data`` encodes.

        Raises:
            WireError: ``data`` is not the encoding of a value of one of the codec's types.
        """
        try:
            outer = self._outer.decode(data)
            if outer.tag not in self._accepted:
                raise WireError(f"unexpected kind of value {outer.tag!r}")
            return self._fields(outer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the latter for a tag that is no text
            raise WireError(str(error)) from error

    def _tagged(self, value: object) -> tuple[str, object]:
        match value:
            case Send(to, message):
                return ("Send", (to, self._tagged(message)))
            case Received(sender, message):
                return ("Received", (sender, self._tagged(message)))
        return (type(value).__name__, value)

    def _fields(self, outer: _Tagged) -> Any:
        if outer.tag in {"Send", "Received"}:
            routed = self._routed.decode(outer.fields)
            if routed.message.tag not in _MESSAGE_NAMES:
                raise WireError(f"{outer.tag} carries {routed.message.tag!r}, which is no message")
            message = self._fields(routed.message)
            return Send(routed.party, message) if outer.tag == "Send" else Received(routed.party, message)
        return self._decoders[outer.tag].decode(outer.fields)


_MESSAGE_NAMES = frozenset(kind.__name__ for kind in _MESSAGES)

EVENTS = Codec(get_args(Event))
"""Codec of :data:`distserve.core.events.Event`; a message travels between processes as a ``Received``."""

COMMANDS = Codec(get_args(Command))
"""Codec of :data:`distserve.core.commands.Command`, for event logs."""
