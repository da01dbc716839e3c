"""Incremental decoding: pieces are valid text as early as possible and add up to the whole."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from distserve.api.detokenize import MAX_HELD_TOKENS, detokenizer_for
from distserve.api.model import load_served_model
from distserve.api.tokenizer import TextTokenizer
from tests.api.conftest import MODEL_DIR


def sentencepiece_like() -> TextTokenizer:
    """A vocabulary as Llama 2 has it: ``▁`` for spaces, bytes as a last resort."""
    words = ["<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words += ["▁", "▁the", "▁fox", "s", "é", *"abcdefghijklmnopqrtuvwxyz"]
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return TextTokenizer(bpe, chat_template=None, named_tokens={"eos_token": "</s>"})


def byte_level() -> TextTokenizer:
    tokenizer = load_served_model(MODEL_DIR).tokenizer
    assert tokenizer is not None
    return tokenizer


BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece_like()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])


def pieces_of(tokenizer: TextTokenizer, token_ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = detokenizer_for(tokenizer, (), skip_special_tokens=skip_special_tokens)
    return [*[detokenizer.feed(token_id) for token_id in token_ids], detokenizer.flush()]


@given(st.lists(st.integers(0, 3071), max_size=40), st.booleans())
def test_any_byte_level_tokens_add_up_to_their_decoding(token_ids: list[int], skip: bool) -> None:
    text = "".join(pieces_of(BYTE_LEVEL, token_ids, skip_special_tokens=skip))
    assert text == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


@TOKENIZERS
@given(text=st.text(max_size=40))
def test_any_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@TOKENIZERS
def test_a_character_leaves_with_its_last_byte(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("a🦊b", add_special_tokens=False)
    pieces = [piece for piece in pieces_of(tokenizer, token_ids) if piece]
    assert pieces == ["a", "🦊", "b"]


@TOKENIZERS
def test_bytes_that_never_become_a_character_are_not_held_for_ever(tokenizer: TextTokenizer) -> None:
    lead = next(i for i in range(3000) if tokenizer.token_bytes(i) == b"\xf0")
    pieces = pieces_of(tokenizer, [lead] * (2 * MAX_HELD_TOKENS))
    assert any(pieces[: MAX_HELD_TOKENS + 1])
    assert set("".join(pieces)) == {"\ufffd"}


def test_a_leading_space_survives_after_a_prompt() -> None:
    prompt = SENTENCEPIECE.encode("the", add_special_tokens=False)
    fox = SENTENCEPIECE.encode("fox", add_special_tokens=False)
    detokenizer = detokenizer_for(SENTENCEPIECE, prompt, skip_special_tokens=True)
    assert next(detokenizer.feed(token_id) for token_id in fox).startswith(" ")


@TOKENIZERS
def test_ids_outside_the_vocabulary_have_no_text(tokenizer: TextTokenizer) -> None:
    assert "".join(pieces_of(tokenizer, [10**6, 10**9])) == ""


def test_tokens_are_named_so_that_json_can_carry_them() -> None:
    lead = next(i for i in range(3000) if BYTE_LEVEL.token_bytes(i) == b"\xf0")
    assert BYTE_LEVEL.token_text(lead) == "bytes:\\xf0"
    assert json.loads(json.dumps(SENTENCEPIECE.token_text(259))) == " the"
