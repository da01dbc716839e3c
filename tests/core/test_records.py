"""Records behave as the frozen dataclasses that their decorator promises, whatever they are made of."""

import pickle
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest

from distserve.core.commands import Send
from distserve.core.messages import Hello, Leased
from distserve.core.request import Request, SamplingParams


def test_records_are_equal_and_hashed_by_their_fields() -> None:
    """Two of the same fields are one in a set; another field, or another kind, makes another."""
    lease = Leased(("a", 0), 10.0)
    assert lease == Leased(("a", 0), 10.0)
    assert len({lease, Leased(("a", 0), 10.0), replace(lease, term=5.0)}) == 2
    assert Send("router", Hello()) != Hello()


def test_records_have_no_room_for_other_attributes() -> None:
    """They are slotted: a misspelt name raises instead of being kept."""
    assert not hasattr(Hello(), "__dict__")


def test_nobody_sets_a_field_of_a_record() -> None:
    with pytest.raises(AttributeError):
        Leased(("a", 0), 10.0).term = 5.0  # type: ignore[misc]


def test_records_are_dataclasses_to_whoever_takes_them_apart() -> None:
    """``fields``, ``replace`` and ``asdict`` see them so; properties, defaults and pickles are those of the class."""
    request = Request("a", "owner", (1, 2), SamplingParams(max_tokens=3))
    assert [field.name for field in fields(Leased)] == ["key", "term"]
    assert replace(request, attempt=1).key == ("a", 1)
    assert asdict(request)["sampling"]["max_tokens"] == 3
    assert request.choices == (0,)
    assert pickle.loads(pickle.dumps(request)) == request


def test_the_engine_needs_no_msgspec() -> None:
    """On a machine without it records are plain dataclasses, and engines are loaded as ever."""
    script = """if True:
        import sys
        sys.modules["msgspec"] = None
        import distserve.engine.worker
        from dataclasses import replace
        from distserve.core.messages import Leased
        lease = Leased(("a", 0), 10.0)
        assert {lease, replace(lease, term=10.0)} == {lease} and not hasattr(lease, "__dict__")
        match lease:
            case Leased(key, 10.0):
                print(key)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "('a', 0)\n", done.stderr
