"""One HTTP request for generation, fully checked: what goes to the backend and how the answer is to look."""

from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from distserve.api.model import ServedModel
from distserve.api.prompts import Prompt, completion_prompts, conversation_prompt
from distserve.api.sampling import sampling_params
from distserve.api.schemas import ChatBody, CompletionBody, GenerationBody
from distserve.core.errors import InvalidRequestError, NotFoundError
from distserve.core.request import Request, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; a chat answer may fill the context."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How the answer is to look; names as in the body."""

    stream: bool
    include_usage: bool
    return_token_ids: bool
    return_timeline: bool
    show_prompt_logprobs: bool
    echo: bool
    echo_only: bool
    logprobs: bool
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Job:
    """``requests[i]`` serves ``prompts[i]`` with ``n`` choices; choice c of prompt i is choice ``i * n + c``."""

    job_id: str
    created: int
    arrival: float
    kind: Literal["completion", "chat"]
    model_name: str
    model: ServedModel
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    n: int
    options: OutputOptions


def check_model(name: str | None, model: ServedModel) -> str:
    """The name to answer with; NotFoundError if it is none of the model's."""
    if name is None:
        return model.names[0]
    if name not in model.names:
        raise NotFoundError(f"the model {name!r} does not exist; served here: {', '.join(model.names)}", param="model")
    return name


def _options(body: GenerationBody, *, echo: bool, echo_only: bool, logprobs: bool, model: ServedModel) -> OutputOptions:
    stream = body.stream is True
    if body.stream_options is not None and not stream:
        raise InvalidRequestError("stream_options needs stream", param="stream_options")
    if stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.stop_strings and model.tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer, so no stop strings; use stop_token_ids", param="stop")
    return OutputOptions(
        stream=stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage is True,
        # Without a tokenizer the ids are all there is to say.
        return_token_ids=body.return_token_ids is True or model.tokenizer is None,
        return_timeline=body.return_timeline is True,
        show_prompt_logprobs=body.prompt_logprobs is not None,
        echo=echo,
        echo_only=echo_only,
        logprobs=logprobs,
        stops=body.stop_strings,
        include_stop=body.include_stop_str_in_output is True,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _requests(
    job_id: str,
    owner_id: str,
    prompts: list[Prompt],
    samplings: list[SamplingParams],
    body: GenerationBody,
    arrival: float,
) -> tuple[Request, ...]:
    return tuple(
        Request(
            request_id=f"{job_id}-{i}",
            owner_id=owner_id,
            prompt_token_ids=tuple(prompt.token_ids),
            sampling=sampling,
            choices=tuple(range(body.n or 1)),
            arrival=arrival,
            cache_salt=body.cache_salt or "",
        )
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    )


async def completion_job(
    body: CompletionBody, model: ServedModel, owner_id: str, max_choices: int, arrival: float
) -> Job:
    """Check a completion request and tokenise its prompts. Raises RequestError."""
    name = check_model(body.model, model)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequestError("best_of is supported only equal to n", param="best_of")
    echo = body.echo is True
    echo_only = echo and body.max_tokens == 0
    options = _options(body, echo=echo, echo_only=echo_only, logprobs=body.logprobs is not None, model=model)
    prompts = await completion_prompts(body, model, max_choices // n)
    prompt_logprobs = [k for k in (body.prompt_logprobs, body.logprobs if echo else None) if k is not None]
    samplings = [
        sampling_params(
            body,
            model,
            len(prompt.token_ids),
            max_tokens=1 if echo_only else body.max_tokens,
            max_tokens_default=COMPLETION_MAX_TOKENS,
            max_tokens_param="max_tokens",
            logprobs=body.logprobs,
            prompt_logprobs=max(prompt_logprobs, default=None),
        )
        for prompt in prompts
    ]
    job_id = f"cmpl-{uuid4().hex}"
    requests = _requests(job_id, owner_id, prompts, samplings, body, arrival)
    return Job(job_id, int(arrival), arrival, "completion", name, model, tuple(prompts), requests, n, options)


async def chat_job(body: ChatBody, model: ServedModel, owner_id: str, max_choices: int, arrival: float) -> Job:
    """Check a chat request, apply the chat template and tokenise. Raises RequestError."""
    name = check_model(body.model, model)
    n = body.n or 1
    if n > max_choices:
        raise InvalidRequestError(f"n: at most {max_choices} choices per request", param="n")
    if body.top_logprobs is not None and body.logprobs is not True:
        raise InvalidRequestError("top_logprobs needs logprobs", param="top_logprobs")
    options = _options(body, echo=False, echo_only=False, logprobs=body.logprobs is True, model=model)
    prompt = await conversation_prompt(body, model)
    by_name = body.max_completion_tokens is not None
    sampling = sampling_params(
        body,
        model,
        len(prompt.token_ids),
        max_tokens=body.max_completion_tokens if by_name else body.max_tokens,
        max_tokens_default=model.defaults.max_tokens,
        max_tokens_param="max_completion_tokens" if by_name else "max_tokens",
        logprobs=(body.top_logprobs or 0) if options.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    job_id = f"chatcmpl-{uuid4().hex}"
    requests = _requests(job_id, owner_id, [prompt], [sampling], body, arrival)
    return Job(job_id, int(arrival), arrival, "chat", name, model, (prompt,), requests, n, options)
