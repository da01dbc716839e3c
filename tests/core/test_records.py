"""Records behave as the frozen dataclasses that their decorator promises, but for the guard."""

from dataclasses import replace

from distserve.core.commands import Send
from distserve.core.messages import Hello, Leased


def test_records_are_equal_and_hashed_by_their_fields() -> None:
    """Two of the same fields are one in a set; another field, or another kind, makes another."""
    lease = Leased(("a", 0), 10.0)
    assert lease == Leased(("a", 0), 10.0)
    assert len({lease, Leased(("a", 0), 10.0), replace(lease, term=5.0)}) == 2
    assert Send("router", Hello()) != Hello()


def test_records_have_no_room_for_other_attributes() -> None:
    """They are slotted: a misspelt name raises instead of being kept."""
    assert not hasattr(Hello(), "__dict__")
