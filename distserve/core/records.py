"""Dataclasses made by the million: events, commands, messages, requests.

``@record(frozen=True, slots=True)`` is ``dataclass`` to readers and type checkers. At run time the class is a
:class:`msgspec.Struct` of the same fields, which is made five times as fast, and :mod:`dataclasses`' functions
(``replace``, ``fields``, ``asdict``) work on it. A request through the simulator is about seventy records. In compiled
modules, and where msgspec is not installed, as on machines that run an engine alone, it is a slotted dataclass whose
fields nobody guards.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass
from typing import TYPE_CHECKING, Any

try:
    import msgspec
except ImportError:
    msgspec = None  # type: ignore[assignment]

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, slots: bool) -> Callable[[type], type]:
        """A slotted class, equal and hashed by its fields as a frozen dataclass is."""
        assert frozen, "what may be changed is a plain dataclass"

        def make(cls: type) -> type:
            namespace = dict(vars(cls))
            made = dataclass(slots=slots, unsafe_hash=True)(cls)
            is_compiled = "__mypyc_attrs__" in namespace
            return made if msgspec is None or is_compiled else _struct(made, namespace)

        return make

    def _struct(made: type, namespace: dict[str, Any]) -> type:
        """The struct with the fields of a dataclass, and whatever else was in its class's ``namespace``."""
        fields: dict[str, Field[Any]] = made.__dataclass_fields__
        assert all(field.default_factory is MISSING for field in fields.values()), "defaults of records are constants"
        for name in (*fields, "__dict__", "__weakref__", "__annotations__"):
            namespace.pop(name, None)
        struct = msgspec.defstruct(
            made.__name__,
            [
                (field.name, field.type) if field.default is MISSING else (field.name, field.type, field.default)
                for field in fields.values()
            ],
            namespace=namespace,
            module=made.__module__,
            frozen=True,
        )
        struct.__qualname__ = made.__qualname__
        struct.__dataclass_fields__ = fields
        struct.__dataclass_params__ = made.__dataclass_params__
        return struct
