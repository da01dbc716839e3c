"""From a prompt and its options to a checked job, through the very bodies that the HTTP endpoint checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from distserve.api.errors import validation_error
from distserve.api.job import Job, chat_job, completion_job
from distserve.api.model import ServedModel
from distserve.api.schemas import MAX_CHOICES_PER_PROMPT, ChatBody, CompletionBody, GenerationBody
from distserve.core.errors import InvalidRequestError
from distserve.offline.params import Chat, Prompt, SamplingParams

BodyT = TypeVar("BodyT", bound=GenerationBody)


def batch_of(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """``prompts`` as a list, also when it is a single one. Raises InvalidRequestError for what is no prompt."""
    if isinstance(prompts, str | Chat):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping | bytes):
        raise _no_prompt(prompts)
    given = list(prompts)
    if given and isinstance(given[0], int | Mapping):
        return [cast("Prompt", given)]
    for prompt in given:
        if not isinstance(prompt, str | Chat | Sequence) or isinstance(prompt, bytes):
            raise _no_prompt(prompt)
    return cast("list[Prompt]", given)


def params_for(
    prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """The options of each prompt: the same for all, or one each. Raises InvalidRequestError."""
    if not isinstance(given, Sequence):
        return [checked_params(given)] * len(prompts)
    if len(given) != len(prompts):
        raise InvalidRequestError(
            f"{len(given)} sampling_params for {len(prompts)} prompts: give one for all, or one for each",
            param="sampling_params",
        )
    return [checked_params(one) for one in given]


def checked_params(given: SamplingParams | None) -> SamplingParams:
    """The options of one prompt, all unset for None. Raises InvalidRequestError for what is none, like a dict."""
    if given is None:
        return SamplingParams()
    if not isinstance(given, SamplingParams):
        raise InvalidRequestError(
            f"sampling_params must be a distserve.SamplingParams, not {type(given).__name__}", param="sampling_params"
        )
    return given


async def make_job(
    prompt: Prompt, params: SamplingParams, model: ServedModel, owner_id: str, arrival: float, *, stream: bool = False
) -> Job:
    """Check ``params``, render and tokenise ``prompt``. Raises InvalidRequestError."""
    fields = _fields(params) | {"stream": stream}
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        prompt = Chat(cast("Sequence[Mapping[str, Any]]", prompt))
    if isinstance(prompt, Chat):
        if (num_top := fields.pop("logprobs", None)) is not None:
            # OpenAI's chat API asks in two fields.
            fields |= {"logprobs": True, "top_logprobs": num_top}
        chat = _checked(ChatBody, fields | _conversation(prompt))
        return await chat_job(chat, model, owner_id, MAX_CHOICES_PER_PROMPT, arrival)
    given = _listed(prompt)
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        raise InvalidRequestError("prompt: one prompt is a text or token ids, not several of them", param="prompt")
    completion = _checked(CompletionBody, fields | {"prompt": given})
    return await completion_job(completion, model, owner_id, MAX_CHOICES_PER_PROMPT, arrival)


def _checked(schema: type[BodyT], fields: dict[str, Any]) -> BodyT:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error, fields) from error


def _fields(params: SamplingParams) -> dict[str, Any]:
    """What was set, sequences as the lists that a JSON body would have."""
    return {name: _listed(value) for name, value in asdict(params).items() if value is not None}


def _conversation(chat: Chat) -> dict[str, Any]:
    messages = _listed(chat.messages)
    if isinstance(messages, list):
        messages = [dict(message) if isinstance(message, Mapping) else message for message in messages]
    return {
        "messages": messages,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "chat_template_kwargs": chat.chat_template_kwargs,
    }


def _listed(value: object) -> object:
    """A list of a sequence's items. What is no sequence is left as it is: the bodies say what they want there."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return value
    return list(value)


def _no_prompt(given: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"a prompt is a text, a list of token ids or a list of messages, not {type(given).__name__}", param="prompt"
    )
