"""From a validated body and the model's limits to the core's SamplingParams."""

import secrets
from typing import TypeVar

from distserve.api.errors import ContextLengthError
from distserve.api.model import ServedModel
from distserve.api.schemas import GenerationBody
from distserve.core.errors import InvalidRequestError
from distserve.core.request import SamplingParams

MIN_TEMPERATURE = 0.01
"""Lower positive temperatures would overflow the logits; vLLM raises them to this as well."""

T = TypeVar("T")


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def check_token_ids(token_ids: list[int], model: ServedModel, param: str) -> None:
    """Raise InvalidRequestError if an id is outside the vocabulary."""
    if token_ids and max(token_ids) >= model.vocab_size:
        raise InvalidRequestError(
            f"{param}: token id {max(token_ids)} is outside the vocabulary of {model.vocab_size} tokens", param=param
        )


def check_prompt_length(num_tokens: int, model: ServedModel, param: str, *, exact: bool = True) -> None:
    """Raise ContextLengthError if a prompt of ``num_tokens`` (at least, if not ``exact``) leaves no room for output."""
    if num_tokens >= model.max_model_len:
        amount = f"{num_tokens}" if exact else f"at least {num_tokens}"
        raise ContextLengthError(
            f"this model's maximum context length is {model.max_model_len} tokens, but the prompt has {amount} and "
            "needs room for at least one more; shorten the prompt",
            param=param,
        )


def _max_tokens(wanted: int | None, num_prompt_tokens: int, default: int | None, model: ServedModel, param: str) -> int:
    room = model.max_model_len - num_prompt_tokens
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise ContextLengthError(
            f"this model's maximum context length is {model.max_model_len} tokens, but {num_prompt_tokens + wanted} "
            f"were requested ({num_prompt_tokens} in the prompt, {wanted} for the output); reduce either",
            param=param,
        )
    return wanted


def sampling_params(
    body: GenerationBody,
    model: ServedModel,
    num_prompt_tokens: int,
    *,
    max_tokens: int | None,
    max_tokens_default: int | None,
    max_tokens_param: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The parameters for one prompt of ``num_prompt_tokens`` tokens.

    ``max_tokens_default`` None means the rest of the context. What the body leaves open takes the model's defaults. A
    seed is drawn if none was given. Raises InvalidRequestError.
    """
    if max_tokens == 0:
        raise InvalidRequestError(f"{max_tokens_param} must be at least 1", param=max_tokens_param)
    limit = _max_tokens(max_tokens, num_prompt_tokens, max_tokens_default, model, max_tokens_param)
    min_tokens = _given(body.min_tokens, 0)
    if min_tokens > limit:
        raise InvalidRequestError(
            f"min_tokens is {min_tokens}, but at most {limit} tokens may be generated", param="min_tokens"
        )
    stop_token_ids = body.stop_token_ids or []
    logit_bias = body.logit_bias or {}
    check_token_ids(stop_token_ids, model, "stop_token_ids")
    check_token_ids(list(logit_bias), model, "logit_bias")
    temperature = _given(body.temperature, model.defaults.temperature)
    return SamplingParams(
        max_tokens=limit,
        temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0,
        top_p=_given(body.top_p, model.defaults.top_p),
        top_k=min(max(_given(body.top_k, model.defaults.top_k), 0), model.vocab_size),
        min_p=_given(body.min_p, model.defaults.min_p),
        repetition_penalty=_given(body.repetition_penalty, model.defaults.repetition_penalty),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias=tuple(logit_bias.items()),
        # Any 64-bit seed is accepted; the core's are 63-bit and not negative.
        seed=secrets.randbits(63) if body.seed is None else body.seed & (2**63 - 1),
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop_token_ids),
        eos_token_ids=model.eos_token_ids,
        ignore_eos=_given(body.ignore_eos, False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
