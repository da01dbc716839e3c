"""Entries of a JSON array read one by one are those that the whole text has, wherever it is cut."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.bench import json_array
from distserve.bench.errors import WorkloadError
from distserve.bench.json_array import read_entries

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read(text: str, chunk: int) -> list[object]:
    """The entries, read ``chunk`` characters at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        return list(read_entries(Path("trace"), io.StringIO(text)))


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]))
def test_entries_are_those_of_the_whole_text(values: list[object], chunk: int, indent: int | None) -> None:
    assert read(json.dumps(values, indent=indent), chunk) == values


@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_what_is_cut_off_is_an_error(values: list[object], chunk: int, data: st.DataObject) -> None:
    text = json.dumps(values, indent=1)
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(WorkloadError, match=r"^trace:\d+: .* at column \d+$"):
        read(text[:end], chunk)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n {"a": 1},\n {"b": }\n]', "trace:3: not JSON: Expecting value at column 8"),
        ("[1,\n2\n3]", "trace:3: not JSON: Expecting ',' delimiter at column 1"),
        ("[1]\n\n ]", "trace:3: not JSON: Extra data at column 2"),
        ('\n {"a": 1}', "trace:2: not a JSON array at column 2"),
    ],
)
def test_an_error_names_line_and_column(text: str, place: str, chunk: int) -> None:
    with pytest.raises(WorkloadError, match=f"^{place}$"):
        read(text, chunk)


def test_an_entry_that_never_ends_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after the longest that is believed, with most of the file unread."""
    monkeypatch.setattr(json_array, "_LONGEST", 1 << 12)
    monkeypatch.setattr(json_array, "_CHUNK", 1 << 8)
    file = io.StringIO('["' + "x" * (1 << 20))
    with pytest.raises(WorkloadError, match="Unterminated string"):
        list(read_entries(Path("trace"), file))
    assert file.tell() < 1 << 14
