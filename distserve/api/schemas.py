"""Request bodies: which fields there are, their types and their ranges.

Types are strict (``"5"`` is no number, ``true`` is no integer), numbers finite, and fields nobody knows are ignored, as
OpenAI's and vLLM's servers do. Fields that would change the answer but cannot be honoured are listed in UNSUPPORTED
and refused. Names are OpenAI's, and vLLM's for what OpenAI lacks.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES_PER_PROMPT = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024
MAX_SALT_LENGTH = 1024

MAX_INT64 = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_INT64)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=0, le=MAX_INT64)]

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "chat_template": (None,),
    "truncate_prompt_tokens": (None,),
}
"""Fields that are not supported, each with the values that ask for nothing."""


class Body(BaseModel):
    """What all bodies have in common. Unknown fields are kept only to be looked up in UNSUPPORTED."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str | None = Field(None, description="A name /v1/models lists; the served model if absent.")


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class GenerationBody(Body):
    """Sampling and output options that completions and chat share."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT)
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT64, description="0 and -1 switch it off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = Field(None, description="Added to the logits of token ids (as strings).")
    seed: int | None = Field(None, ge=-MAX_INT64 - 1, le=MAX_INT64)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description=f"At most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_SALT_LENGTH,
        description="Share cached prefixes only with this salt's requests.",
    )
    return_token_ids: bool | None = Field(None, description="Adds token_ids to choices, and prompt_token_ids.")
    return_timeline: bool | None = Field(None, description="Adds a timeline: when each phase and token happened.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, without repeats."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(dict.fromkeys(self.stop))


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="A text, token ids, or a list of either."
    )
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT, description="Only equal to n.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None


class TextPart(BaseModel):
    """A content part; only text can be read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a conversation; further fields reach the chat template as they are."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None


class ConversationBody(Body):
    """What turns a conversation into a prompt."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(ConversationBody, GenerationBody):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TokenizeBody(Body):
    """``POST /tokenize``: a ``prompt`` or ``messages``, as vLLM has it."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: TokenIds


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error response."""

    error: ErrorDetail


DESCRIBED = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, ErrorBody)
"""Schemas that the OpenAPI description refers to by name."""
