"""From what a body calls its prompt to token ids: tokenising, chat templating, checks against the model's limits."""

import asyncio
from dataclasses import dataclass
from typing import Any

from distserve.api.model import ServedModel
from distserve.api.sampling import check_prompt_length, check_token_ids
from distserve.api.schemas import ChatMessage, CompletionBody, ConversationBody, TokenizeBody
from distserve.api.tokenizer import LONG_TEXT, TextTokenizer
from distserve.core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and its text if that is what the client sent."""

    token_ids: list[int]
    text: str | None = None


def require_tokenizer(model: ServedModel, param: str) -> TextTokenizer:
    """The model's tokenizer; InvalidRequestError if it has none."""
    if model.tokenizer is None:
        raise InvalidRequestError(
            "this model has no tokenizer: send prompts as token ids to /v1/completions", param=param
        )
    return model.tokenizer


async def encode(text: str, model: ServedModel, param: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenise ``text`` of any length without keeping the event loop busy for long."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param}: character {error.start} is half of a surrogate pair, which is no text", param=param
        ) from error
    tokenizer = require_tokenizer(model, param)
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _check_text_length(text: str, model: ServedModel, param: str) -> None:
    """Refuse a text that cannot fit the context, however it is tokenised, before that costs anything."""
    longest = require_tokenizer(model, param).longest_token
    check_prompt_length(-(-len(text) // longest), model, param, exact=False)


async def completion_prompts(body: CompletionBody, model: ServedModel, max_prompts: int) -> list[Prompt]:
    """The prompts of a completion request, one or a batch. Raises InvalidRequestError."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise InvalidRequestError("prompt is empty", param="prompt")
    if len(given) > max_prompts:
        raise InvalidRequestError(
            f"prompt: {len(given)} prompts are more than the {max_prompts} that one request may hold with its n",
            param="prompt",
        )
    add_special_tokens = body.add_special_tokens is not False
    prompts = []
    for prompt in given:
        if not prompt:
            raise InvalidRequestError("prompt is empty", param="prompt")
        if isinstance(prompt, str):
            _check_text_length(prompt, model, "prompt")
            await asyncio.sleep(0)  # a long batch lets others in between
            ids = await encode(prompt, model, "prompt", add_special_tokens=add_special_tokens)
            prompts.append(Prompt(ids, prompt))
        else:
            ids = prompt
            prompts.append(Prompt(ids))
        if not ids:
            raise InvalidRequestError("prompt is empty: it has no tokens", param="prompt")
        # Of texts too: a tokenizer may know tokens that the model has no embedding for.
        check_token_ids(ids, model, "prompt")
        check_prompt_length(len(ids), model, "prompt")
    return prompts


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates expect it: content one string, text parts joined by newlines as vLLM does."""
    extra = message.model_extra or {}
    if extra.get("tool_calls"):
        raise InvalidRequestError("tool calls are not supported", param=f"messages[{index}].tool_calls")
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"content parts of type {part.type!r} are not supported: this is a text model, send type 'text' "
                    "with a text",
                    param=f"messages[{index}].content[{i}]",
                )
        content = "\n".join(part.text or "" for part in content)
    if content is None:
        raise InvalidRequestError("content is missing", param=f"messages[{index}].content")
    named = {} if message.name is None else {"name": message.name}
    return {**extra, **named, "role": message.role, "content": content}


RESERVED_KWARGS = frozenset(
    {"messages", "conversations", "chat_template", "tools", "documents", "add_generation_prompt"}
    | {"continue_final_message", "return_assistant_tokens_mask"}
)


async def conversation_prompt(body: ConversationBody | TokenizeBody, model: ServedModel) -> Prompt:
    """A conversation through the model's chat template. Raises InvalidRequestError.

    Only one that is to be served must fit the context and the vocabulary.
    """
    is_served = isinstance(body, ConversationBody)
    tokenizer = require_tokenizer(model, "messages")
    template_kwargs = body.chat_template_kwargs or {}
    if reserved := RESERVED_KWARGS & template_kwargs.keys():
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {', '.join(sorted(reserved))}", param="chat_template_kwargs"
        )
    continue_final = body.continue_final_message is True
    if continue_final and body.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    messages = [_template_message(message, i) for i, message in enumerate(body.messages or ())]
    text = tokenizer.render_chat(
        messages,
        add_generation_prompt=body.add_generation_prompt is not False and not continue_final,
        continue_final_message=continue_final,
        template_kwargs=template_kwargs,
    )
    if is_served:
        _check_text_length(text, model, "messages")
    # The template writes the special tokens itself.
    ids = await encode(text, model, "messages", add_special_tokens=body.add_special_tokens is True)
    if not ids:
        raise InvalidRequestError("the conversation has no tokens", param="messages")
    if is_served:
        check_token_ids(ids, model, "messages")
        check_prompt_length(len(ids), model, "messages")
    return Prompt(ids, text)
