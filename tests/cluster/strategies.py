"""Hypothesis strategies for every dataclass of the core's unions, derived from their annotations."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

FLOATS = st.floats(allow_nan=False, width=64)
INTS = st.integers(min_value=-(2**63), max_value=2**64 - 1)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation; sequences are drawn as tuples."""
    origin, args = get_origin(annotation), get_args(annotation)
    simple = {int: INTS, float: FLOATS, str: st.text(max_size=8), bool: st.booleans(), type(None): st.none()}
    if annotation in simple:
        return simple[annotation]
    if origin in {UnionType, Union}:
        return st.one_of([values_of(arg) for arg in args])
    if origin is tuple and args[-1] is not ...:
        return st.tuples(*[values_of(arg) for arg in args])
    if origin in {tuple, Sequence}:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return st.sampled_from(list(annotation))
    assert isinstance(annotation, type)
    assert is_dataclass(annotation), annotation
    hints = get_type_hints(annotation)
    return st.builds(annotation, **{field.name: values_of(hints[field.name]) for field in fields(annotation)})


def tupled(value: Any) -> Any:
    """``value`` with every list turned into a tuple, so that decoded values compare equal to the originals."""
    if isinstance(value, list | tuple):
        return tuple(tupled(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: tupled(getattr(value, field.name)) for field in fields(value)})
    return value
