"""Dataclasses made by the million: events, commands, messages, requests.

``@record(frozen=True, slots=True)`` is ``dataclass`` to readers and type checkers, who keep the fields from being set.
At run time nobody guards them: ``__init__`` of a guarded class goes through ``object.__setattr__`` for every field and
takes two and a half times as long. A request through the simulator is about seventy records.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, slots: bool) -> Callable[[type], type]:
        """A slotted dataclass, equal and hashed by its fields as a frozen one is."""
        assert frozen, "what may be changed is a plain dataclass"
        return dataclass(slots=slots, unsafe_hash=True)
