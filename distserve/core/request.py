"""What a client asked for, and what comes back token by token.

A :class:`Request` is immutable and self-contained: it carries the prompt and, after a loss or preemption, the tokens
already emitted, with the boundary between them kept, so that penalties, limits, log-probabilities and usage count as
if nothing had happened.
"""

from collections.abc import Sequence
from enum import StrEnum

from distserve.core.records import record


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@record(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; names and semantics as in vLLM's API.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off. ``seed`` is always set (the owner draws one if
    the client gave none), so an attempt that is repeated elsewhere draws the same numbers. ``logprobs`` is the number
    of alternatives returned beside the chosen token's log-probability (0: only the chosen; None: none), likewise
    ``prompt_logprobs`` for each prompt token but the first. ``eos_token_ids`` come from the model; they neither end a
    choice under ``ignore_eos`` nor before ``min_tokens``, and the same holds of ``stop_token_ids`` before
    ``min_tokens``.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a choice once ``min_tokens`` are out."""
        return self.stop_token_ids if self.ignore_eos else self.eos_token_ids + self.stop_token_ids


@record(frozen=True, slots=True)
class Request:
    """One prompt and the choices wanted for it, as submitted in one attempt.

    ``choices`` are the indices this attempt generates: ``0..n-1`` at first, a single one when it is resubmitted.
    ``output_token_ids`` are tokens that choice emitted in earlier attempts (empty unless there is exactly one
    choice); they count as output for penalties and limits, and the next token's index is their number. ``arrival`` is
    in seconds on the owner's clock. Requests of different ``cache_salt`` share no KV, whatever their tokens.
    ``block_keys`` say what the prompt's full KV blocks hold, one key each, for
    instances that look for prefixes: equal keys stand for equal tokens up to the block's end. None leaves it to the
    instance to make them from the tokens; where those are fake, keys must be given, or none (``()``).
    """

    request_id: str
    owner_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    attempt: int = 0
    choices: tuple[int, ...] = (0,)
    output_token_ids: Sequence[int] = ()
    arrival: float = 0.0
    block_keys: tuple[int, ...] | None = None
    cache_salt: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Identity of this attempt: stale attempts are told apart by it."""
        return (self.request_id, self.attempt)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV must exist before the next token can be sampled."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Most tokens one choice can come to, prompt included."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens


@record(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token and of the best alternatives, best first, from the raw (untempered) distribution."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@record(frozen=True, slots=True)
class TokenOutput:
    """One generated token on its way to the owner.

    ``index`` counts the choice's output tokens from 0 across attempts. ``marks`` are named times (seconds, cluster
    clock) that this token made known, see :data:`MARKS`. ``prompt_logprobs`` rides on a request's first token.
    ``num_cached_tokens``, on a choice's first token, are those of its prompt that were not computed for it.
    """

    request_id: str
    attempt: int
    choice: int
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    marks: tuple[tuple[str, float], ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0


MARKS = ("prefill_start", "prefill_end", "migration_start", "migration_end", "decode_start")
"""Names of the times a :class:`TokenOutput` may carry, in the order they happen in a disaggregated request's life."""
