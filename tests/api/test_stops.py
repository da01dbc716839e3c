"""Stop strings: wherever the text is cut, the result is that of a plain search."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.api.stops import StopMatcher
from tests.api.reference import plain_search

alphabet = st.sampled_from("ab🦊")


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text(alphabet, max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return text, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


def run(pieces: list[str], stops: list[str], *, include: bool) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include=include)
    released = []
    for piece in pieces:
        text, stop = matcher.feed(piece)
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


@given(cut_texts(), st.lists(st.text(alphabet, min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_any_cut_gives_what_a_plain_search_gives(cut: tuple[str, list[str]], stops: list[str], include: bool) -> None:
    text, pieces = cut
    released, stop = run(pieces, stops, include=include)
    assert ("".join(released), stop) == plain_search(text, stops, include=include)


@given(cut_texts(), st.lists(st.text(alphabet, min_size=1, max_size=5), min_size=1, max_size=4))
def test_no_character_is_held_back_without_need(cut: tuple[str, list[str]], stops: list[str]) -> None:
    _, pieces = cut
    matcher = StopMatcher(stops, include=False)
    seen = released = ""
    for piece in pieces:
        out, stop = matcher.feed(piece)
        if stop is not None:
            return
        seen, released = seen + piece, released + out
        held = seen[len(released) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (["END"], ["a E", "N", "D b"], ["a ", "", ""]),
        (["END"], ["a E", "N", "O b"], ["a ", "", "ENO b", ""]),
        (["aab"], ["aaab"], ["a"]),
        (["\n\n"], ["x\n", "\ny"], ["x", ""]),
    ],
)
def test_what_leaves_when(stops: list[str], pieces: list[str], released: list[str]) -> None:
    assert run(pieces, stops, include=False)[0] == released
