"""Log-probabilities in the three shapes clients know: OpenAI's for completions and for chat, vLLM's for prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distserve.api.tokenizer import TextTokenizer
from distserve.core.request import TokenLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Entry(NamedTuple):
    """One token's place in an answer; ``logprobs`` is None for the first token of a prompt."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def token_name(token_id: int, tokenizer: TextTokenizer | None) -> str:
    """A token's text, its escaped bytes if it is no whole character, ``token_id:..`` without a tokenizer."""
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def completion_logprobs(entries: Sequence[Entry], tokenizer: TextTokenizer | None, num_top: int) -> dict[str, Any]:
    """OpenAI's legacy object: parallel lists over tokens; ``top_logprobs`` holds the chosen token besides the best."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprobs is None:
            top.append(None)
            continue
        best = {token_name(i, tokenizer): _finite(p) for i, p in entry.logprobs.top[:num_top]}
        best.setdefault(token_name(entry.token_id, tokenizer), _finite(entry.logprobs.logprob))
        top.append(best)
    return {
        "text_offset": [entry.text_offset for entry in entries],
        "token_logprobs": [None if e.logprobs is None else _finite(e.logprobs.logprob) for e in entries],
        "tokens": [token_name(entry.token_id, tokenizer) for entry in entries],
        "top_logprobs": top,
    }


def _chat_token(token_id: int, logprob: float, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    return {
        "token": token_name(token_id, tokenizer),
        "logprob": _finite(logprob),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }


def chat_logprobs(entries: Sequence[Entry], tokenizer: TextTokenizer | None, num_top: int) -> dict[str, Any]:
    """OpenAI's chat object: one entry per output token, each with the ``num_top`` best alternatives."""
    return {
        "content": [
            {
                **_chat_token(entry.token_id, entry.logprobs.logprob, tokenizer),
                "top_logprobs": [_chat_token(i, p, tokenizer) for i, p in entry.logprobs.top[:num_top]],
            }
            for entry in entries
            if entry.logprobs is not None
        ],
        "refusal": None,
    }


def prompt_logprobs(
    prompt_token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: TextTokenizer | None
) -> list[dict[str, Any] | None]:
    """VLLM's list over prompt tokens, the first None: token id to log-probability, rank and text."""
    result: list[dict[str, Any] | None] = [None]
    for token_id, entry in zip(prompt_token_ids[1:], logprobs, strict=True):
        ranked = {i: (p, rank) for rank, (i, p) in enumerate(entry.top, 1)}
        ranked.setdefault(token_id, (entry.logprob, entry.rank))
        result.append(
            {
                str(i): {"logprob": _finite(p), "rank": rank, "decoded_token": token_name(i, tokenizer)}
                for i, (p, rank) in ranked.items()
            }
        )
    return result
