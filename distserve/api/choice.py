"""One choice of one prompt while its tokens come in: text, stop strings, counts and the end."""

from collections.abc import Sequence
from typing import NamedTuple

from distserve.api.detokenize import Detokenizer
from distserve.api.stops import StopMatcher
from distserve.api.timeline import RequestTimeline
from distserve.core.request import FinishReason, SamplingParams, TokenLogprobs, TokenOutput


class Piece(NamedTuple):
    """What one token adds to its choice.

    ``token_id`` is None where a choice ends without a token (aborted). ``text`` may be empty while a character or a
    possible stop string is incomplete, and then comes with a later piece. ``text_offset`` is where the token's own
    text begins in the choice's decoded text. ``stop_reason`` is the stop string or stop token that ended the choice.
    """

    token_id: int | None
    text: str
    text_offset: int = 0
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Choice:
    """Turns tokens into pieces until it has a ``finish_reason``; ``index`` counts over all choices of the HTTP request.

    With ``silent`` (an echoed prompt and no output) tokens are taken and nothing is shown of them.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_matcher",
        "_sampling",
        "_silent",
        "_text_length",
        "finish_reason",
        "index",
        "num_tokens",
        "timeline",
    )

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        sampling: SamplingParams,
        timeline: RequestTimeline,
        *,
        stops: Sequence[str],
        include_stop: bool,
        silent: bool = False,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.timeline = timeline
        self._detokenizer = detokenizer
        self._sampling = sampling
        self._matcher = StopMatcher(stops, include=include_stop) if stops else None
        self._include_stop = include_stop
        self._silent = silent
        self._text_length = 0

    def accept(self, output: TokenOutput) -> Piece:
        """Take the next token. If a stop string ends the choice, the piece's stop_reason is that string."""
        assert self.finish_reason is None
        assert self._silent or output.index == self.num_tokens, "tokens come in order and without gaps"
        finish = output.finish_reason
        if self._silent:
            self.finish_reason = finish
            return Piece(None, "", finish_reason=finish)
        self.num_tokens += 1
        offset = self._text_length
        # As in vLLM, the token that stopped a choice (end of sequence included) shows only on request.
        hidden = finish is FinishReason.STOP and not self._include_stop
        text = "" if hidden else self._detokenizer.feed(output.token_id)
        if finish is not None:
            text += self._detokenizer.flush()
        self._text_length += len(text)
        stop_reason: int | str | None = None
        if self._matcher is not None:
            if output.index >= self._sampling.min_tokens:
                text, stop_reason = self._matcher.feed(text)
            if stop_reason is not None:
                finish = FinishReason.STOP
            elif finish is not None:
                text += self._matcher.flush()
        if finish is FinishReason.STOP and stop_reason is None:
            stop_reason = self._stop_token(output)
        self.finish_reason = finish
        return Piece(output.token_id, text, offset, output.logprobs, finish, stop_reason)

    def conclude(self, finish: FinishReason) -> Piece:
        """The choice ends without a further token."""
        assert self.finish_reason is None
        text = self._detokenizer.flush()
        if self._matcher is not None:
            text = self._matcher.feed(text)[0] + self._matcher.flush()
        self.finish_reason = finish
        return Piece(None, text, self._text_length, finish_reason=finish)

    def _stop_token(self, output: TokenOutput) -> int | None:
        """The token of ``stop_token_ids`` that ended the choice; None for the model's own end of sequence."""
        token_id = output.token_id
        if token_id in self._sampling.eos_token_ids and not self._sampling.ignore_eos:
            return None
        return token_id if token_id in self._sampling.stop_token_ids else None
