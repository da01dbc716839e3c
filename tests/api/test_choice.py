"""One choice from tokens to text: whatever the tokens, the pieces say what the whole text says."""

from hypothesis import given
from hypothesis import strategies as st

from distserve.api.choice import Choice, Piece
from distserve.api.detokenize import detokenizer_for
from distserve.api.model import load_served_model
from distserve.api.timeline import RequestTimeline
from distserve.core.request import FinishReason, SamplingParams, TokenOutput
from tests.api.conftest import MODEL_DIR
from tests.api.reference import plain_search

TOKENIZER = load_served_model(MODEL_DIR).tokenizer
assert TOKENIZER is not None
# Single bytes, whole characters cut in two, words that overlap: everything that meets at token borders.
TEXT = "aab aba 🦊é abab the then hen\n\n"
TOKENS = [*TOKENIZER.encode(TEXT, add_special_tokens=False), 7, 8, 130, 131, 200, 2]
STOPS = ["aba", "ab ", "🦊", "é a", "the", "hen", "\n", "\ufffd", " "]


def choice_of(stops: list[str], *, include: bool, **sampling: int) -> Choice:
    return Choice(
        0,
        detokenizer_for(TOKENIZER, (), skip_special_tokens=True),
        SamplingParams(max_tokens=100, eos_token_ids=(2,), **sampling),
        RequestTimeline(0.0),
        stops=stops,
        include_stop=include,
    )


def run(choice: Choice, tokens: list[int], finish: FinishReason) -> list[Piece]:
    pieces = []
    for index, token_id in enumerate(tokens):
        end = finish if index == len(tokens) - 1 else None
        pieces.append(choice.accept(TokenOutput("r", 0, 0, index, token_id, finish_reason=end)))
        if choice.finish_reason is not None:
            break
    return pieces


tokens_lists = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=20)


@given(tokens_lists, st.lists(st.sampled_from(STOPS), max_size=4, unique=True), st.booleans())
def test_pieces_add_up_to_a_plain_search_of_the_text(tokens: list[int], stops: list[str], include: bool) -> None:
    assert TOKENIZER is not None
    choice = choice_of(stops, include=include)
    pieces = run(choice, tokens, FinishReason.LENGTH)
    text, stop = plain_search(TOKENIZER.decode(tokens, skip_special_tokens=True), stops, include=include)
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].stop_reason == stop
    assert pieces[-1].finish_reason == (FinishReason.LENGTH if stop is None else FinishReason.STOP)
    assert choice.num_tokens == len(pieces)


@given(tokens_lists, st.lists(st.sampled_from(STOPS), min_size=1, max_size=4, unique=True))
def test_a_stop_string_ends_at_the_token_that_completes_it(tokens: list[int], stops: list[str]) -> None:
    assert TOKENIZER is not None
    stops = [stop for stop in stops if stop != "\ufffd"]  # shows only once it is clear that no character follows
    pieces = run(choice_of(stops, include=True), tokens, FinishReason.LENGTH)
    if isinstance(pieces[-1].stop_reason, str):
        before = TOKENIZER.decode(tokens[: len(pieces) - 1], skip_special_tokens=True)
        assert plain_search(before, stops, include=True)[1] is None


@given(tokens_lists, st.integers(0, 20))
def test_offsets_are_where_a_token_s_text_begins(tokens: list[int], min_tokens: int) -> None:
    pieces = run(choice_of(["never there"], include=False, min_tokens=min_tokens), tokens, FinishReason.LENGTH)
    offsets = [piece.text_offset for piece in pieces]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len("".join(piece.text for piece in pieces))


@given(tokens_lists)
def test_what_is_held_back_comes_with_the_end(tokens: list[int]) -> None:
    assert TOKENIZER is not None
    shown = TOKENIZER.decode(tokens, skip_special_tokens=True)
    stops = [shown[-3:] + "x"]
    aborted = choice_of(stops, include=False)
    pieces = [aborted.accept(TokenOutput("r", 0, 0, i, token_id)) for i, token_id in enumerate(tokens)]
    pieces.append(aborted.conclude(FinishReason.ABORT))
    assert "".join(piece.text for piece in pieces) == shown
    ended = run(choice_of(stops, include=False), [*tokens, 2], FinishReason.STOP)
    assert "".join(piece.text for piece in ended) == shown
    assert ended[-1].stop_reason is None
