"""The wire carries every value of the core unchanged and refuses everything else."""

import contextlib
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.cluster.wire import COMMANDS, EVENTS, WireError
from distserve.core.commands import Command
from distserve.core.events import Event, Received
from distserve.core.messages import Abort, Hello, Prefill
from distserve.core.request import Request, SamplingParams

from .strategies import tupled, values_of


@pytest.mark.parametrize("kind", get_args(Event), ids=lambda kind: kind.__name__)
def test_every_event_survives_the_wire(kind: type) -> None:
    @settings(max_examples=60, deadline=None)
    @given(values_of(kind))
    def check(event: object) -> None:
        assert tupled(EVENTS.decode(EVENTS.encode(event))) == event

    check()


@pytest.mark.parametrize("kind", get_args(Command), ids=lambda kind: kind.__name__)
def test_every_command_survives_the_wire(kind: type) -> None:
    @settings(max_examples=60, deadline=None)
    @given(values_of(kind))
    def check(command: object) -> None:
        assert tupled(COMMANDS.decode(COMMANDS.encode(command))) == command

    check()


def test_a_request_decodes_to_the_same_types_that_were_sent() -> None:
    request = Request("r", "o", [1, 2, 3], SamplingParams(max_tokens=4, logit_bias=((5, 0.5),)), choices=(0, 1))
    decoded = EVENTS.decode(EVENTS.encode(Received("router", Prefill(request))))
    assert type(decoded.message.request) is Request
    assert decoded.message.request.sampling == request.sampling
    assert list(decoded.message.request.prompt_token_ids) == [1, 2, 3]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode(["Unknown", {}]),
        msgspec.msgpack.encode(["Abort", {"key": ["r", 0]}]),  # a bare message is no event
        msgspec.msgpack.encode(["Received", ["x", ["Timer", {}]]]),  # an event is no message
        msgspec.msgpack.encode(["Received", ["x", ["Abort", {"key": ["r", "not a number"]}]]]),
        msgspec.msgpack.encode(["Received", ["x"]]),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        EVENTS.decode(data)


@given(st.binary(max_size=64))
def test_noise_never_raises_anything_else(data: bytes) -> None:
    with contextlib.suppress(WireError):
        EVENTS.decode(data)


def test_truncation_is_refused() -> None:
    data = EVENTS.encode(Received("owner", Abort(("request", 3), 1)))
    for end in range(len(data)):
        with pytest.raises(WireError):
            EVENTS.decode(data[:end])
    assert EVENTS.decode(data) == Received("owner", Abort(("request", 3), 1))


def test_only_core_values_are_encoded() -> None:
    with pytest.raises(AssertionError):
        EVENTS.encode(Hello())
