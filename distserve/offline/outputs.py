"""What comes back: whole answers, or one token at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.api.choice import Piece
from distserve.core.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. ``logprobs[i]`` belongs to ``token_ids[i]``; None if they were not asked for.

    ``stop_reason`` is the stop string or the token of ``stop_token_ids`` that ended it, else None.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All choices of one prompt.

    ``prompt`` is its text (a conversation's as the template wrote it), None for token ids. ``prompt_logprobs[i]``
    belongs to ``prompt_token_ids[i + 1]``; None if they were not asked for.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds to choice ``index``.

    ``text`` may be empty while a character or a possible stop string is incomplete. The delta with a ``finish_reason``
    is the choice's last; ``token_id`` is None where a choice ends without a token.
    """

    index: int
    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


def delta_of(index: int, piece: Piece) -> Delta:
    """A choice's piece as the caller sees it."""
    return Delta(index, piece.text, piece.token_id, piece.logprobs, piece.finish_reason, piece.stop_reason)


def whole_choice(index: int, pieces: Sequence[Piece]) -> CompletionOutput:
    """A choice from all its pieces, the last of which ended it."""
    last = pieces[-1]
    assert last.finish_reason is not None
    with_token = [piece for piece in pieces if piece.token_id is not None]
    logprobs = tuple([piece.logprobs for piece in with_token if piece.logprobs is not None])
    return CompletionOutput(
        index=index,
        text="".join([piece.text for piece in pieces]),
        token_ids=tuple([piece.token_id for piece in with_token if piece.token_id is not None]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=logprobs or None,
    )
