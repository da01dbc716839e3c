"""What a caller of :class:`distserve.LLM` can ask for: prompts and sampling options, unchecked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one prompt; names, ranges and defaults are those of the HTTP endpoint.

    What is None takes the model's own default (its ``generation_config.json``), else what the endpoint takes:
    ``temperature`` 1, 16 tokens for a text or token-id prompt, the rest of the context for a conversation. A
    ``temperature`` of 0 is greedy. Without a ``seed`` one is drawn. ``logprobs`` is how many alternatives come with
    each token's log-probability (0: only its own), ``prompt_logprobs`` likewise for each prompt token but the first.

    :class:`distserve.core.request.SamplingParams` is what this comes to once the model's defaults are filled in.
    """

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with options of its template; a plain list of messages is one with none.

    ``messages`` are ``{"role": .., "content": ..}``. With ``continue_final_message`` the model goes on with the last.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Chat
"""A text, token ids, or a conversation."""
