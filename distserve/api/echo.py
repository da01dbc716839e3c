"""Text of tokens that a client sent: of prompts that are echoed, and what ``/detokenize`` is given.

However many they are, the event loop is not kept busy for long.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from distserve.api.detokenize import detokenizer_for
from distserve.api.job import Job
from distserve.api.prompts import Prompt
from distserve.api.tokenizer import MANY_TOKENS, TextTokenizer


class Echo(NamedTuple):
    """A prompt's text, and where in it each token's begins; no ``offsets`` where log-probabilities need none."""

    text: str
    offsets: Sequence[int] = ()


async def decode(token_ids: list[int], tokenizer: TextTokenizer) -> str:
    """The text of ``token_ids``, special tokens included."""
    if len(token_ids) < MANY_TOKENS:
        return tokenizer.decode(token_ids, skip_special_tokens=False)
    return await asyncio.to_thread(tokenizer.decode, token_ids, skip_special_tokens=False)


async def echoes_of(job: Job) -> list[Echo]:
    """Every prompt of ``job`` if it asks for them, else none."""
    if not job.options.echo:
        return []
    if sum(len(prompt.token_ids) for prompt in job.prompts) < MANY_TOKENS:
        return _echoes(job)
    return await asyncio.to_thread(_echoes, job)


def _echoes(job: Job) -> list[Echo]:
    make = _with_offsets if job.options.logprobs else _without_offsets
    return [make(prompt, job) for prompt in job.prompts]


def _without_offsets(prompt: Prompt, job: Job) -> Echo:
    if prompt.text is not None:
        return Echo(prompt.text)
    tokenizer = job.model.tokenizer
    if tokenizer is None:
        return Echo("")
    return Echo(tokenizer.decode(prompt.token_ids, skip_special_tokens=job.options.skip_special_tokens))


def _with_offsets(prompt: Prompt, job: Job) -> Echo:
    detokenizer = detokenizer_for(job.model.tokenizer, (), skip_special_tokens=job.options.skip_special_tokens)
    pieces, offsets, length = [], [], 0
    for token_id in prompt.token_ids:
        offsets.append(length)
        pieces.append(detokenizer.feed(token_id))
        length += len(pieces[-1])
    text = "".join(pieces) + detokenizer.flush()
    return Echo(text if prompt.text is None else prompt.text, offsets)
