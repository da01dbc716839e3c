"""Answers as bytes: one server-sent event per token, or one JSON object at the end.

Events are put together from parts encoded once per request, since they are made for every token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from distserve.api.choice import Choice, Piece
from distserve.api.echo import Echo, echoes_of
from distserve.api.job import Job
from distserve.api.logprobs import Entry, chat_logprobs, completion_logprobs, prompt_logprobs
from distserve.core.request import TokenLogprobs

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


class Answered:
    """A choice's pieces, kept for an answer that is not streamed."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.pieces: list[Piece] = []

    @property
    def text(self) -> str:
        """The choice's text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        """The choice's tokens."""
        return [piece.token_id for piece in self.pieces if piece.token_id is not None]

    @property
    def last(self) -> Piece:
        """The piece that ended the choice."""
        return self.pieces[-1]


class Renderer(ABC):
    """Dresses pieces for one API; the two differ in where the text stands and in the shape of log-probabilities."""

    object_name: str
    chunk_name: str
    text_open: bytes
    text_close: bytes

    def __init__(self, job: Job) -> None:
        self.job = job
        self.options = job.options
        self.tokenizer = job.model.tokenizer
        self.num_top = job.requests[0].sampling.logprobs or 0
        envelope = encode(self._envelope(self.chunk_name))
        self._start = b"data: " + envelope[:-1]
        self._heads = [
            self._start + b',"choices":[{"index":%d,' % index + self.text_open
            for index in range(job.n * len(job.prompts))
        ]
        self._usage_null = b',"usage":null' if self.options.include_usage else b""
        self._tail = (
            self.text_close
            + b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'
            + self._usage_null
            + b"}\n\n"
        )
        self._plain = not self.options.logprobs and not self.options.return_token_ids

    def _envelope(self, object_name: str) -> dict[str, Any]:
        job = self.job
        return {"id": job.job_id, "object": object_name, "created": job.created, "model": job.model_name}

    @abstractmethod
    def opening(self, index: int, logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """The event before a choice's first token, if any; ``logprobs`` are its prompt's."""

    @abstractmethod
    def whole(
        self, answers: Sequence[Answered], logprobs: Sequence[Sequence[TokenLogprobs] | None], num_cached_tokens: int
    ) -> bytes:
        """The answer that is not streamed; ``logprobs[i]`` are prompt i's, the prompts' cached tokens those of all."""

    @abstractmethod
    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]: ...

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """The event for one token."""
        head = self._heads[choice.index]
        if self._plain and piece.finish_reason is None:
            return head + encode(piece.text) + self._tail
        parts = [head, encode(piece.text), self.text_close, b',"logprobs":']
        if self.options.logprobs and piece.token_id is not None:
            parts.append(encode(self._logprobs([self._entry(choice.index, piece)])))
        else:
            parts.append(b"null")
        parts += (
            b',"finish_reason":',
            encode(piece.finish_reason),
            b',"stop_reason":',
            encode(piece.stop_reason),
        )
        if self.options.return_token_ids:
            parts += (b',"token_ids":', encode([] if piece.token_id is None else [piece.token_id]))
        parts += (b"}]", self._usage_null)
        if piece.finish_reason is not None and self.options.return_timeline:
            parts += (b',"timeline":', encode(choice.timeline.as_dict()))
        parts.append(b"}\n\n")
        return b"".join(parts)

    def _entry(self, index: int, piece: Piece) -> Entry:
        assert piece.token_id is not None
        return Entry(piece.token_id, piece.text_offset + self._offset(index), piece.logprobs)

    def _offset(self, index: int) -> int:  # noqa: ARG002 - echoed prompts need it
        return 0

    def usage(self, num_output_tokens: int, num_cached_tokens: int) -> bytes:
        """The event that ends a stream with ``include_usage``."""
        usage = self._usage(num_output_tokens, num_cached_tokens)
        return self._start + b',"choices":[],"usage":' + encode(usage) + b"}\n\n"

    def _usage(self, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.job.prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }

    def _whole(
        self,
        answers: Sequence[Answered],
        choices: list[dict[str, Any]],
        num_cached_tokens: int,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        for answer, choice in zip(answers, choices, strict=True):
            choice["finish_reason"] = answer.last.finish_reason
            choice["stop_reason"] = answer.last.stop_reason
            if self.options.return_token_ids:
                choice["token_ids"] = answer.token_ids
            if self.options.return_timeline and len(answers) > 1:
                choice["timeline"] = answer.choice.timeline.as_dict()
        body = {
            **self._envelope(self.object_name),
            "choices": choices,
            "usage": self._usage(sum(answer.choice.num_tokens for answer in answers), num_cached_tokens),
            **(extra or {}),
        }
        if self.options.return_timeline and len(answers) == 1:
            body["timeline"] = answers[0].choice.timeline.as_dict()
        return encode(body)

    def _entries(self, answer: Answered) -> list[Entry]:
        return [self._entry(answer.choice.index, piece) for piece in answer.pieces if piece.token_id is not None]


class CompletionRenderer(Renderer):
    """``text_completion`` objects, with a prompt of ``echoes`` in front if there are any."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    text_open = b'"text":'
    text_close = b""

    def __init__(self, job: Job, echoes: Sequence[Echo]) -> None:
        super().__init__(job)
        self._echoes = echoes

    def _offset(self, index: int) -> int:
        return len(self._echoes[index // self.job.n].text) if self._echoes else 0

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return completion_logprobs(entries, self.tokenizer, self.num_top)

    def _echo_entries(self, i: int, logprobs: Sequence[TokenLogprobs] | None) -> list[Entry]:
        known = [None, *(logprobs or ())]
        triples = zip(self.job.prompts[i].token_ids, self._echoes[i].offsets, known, strict=True)
        return [Entry(*triple) for triple in triples]

    def opening(self, index: int, logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """The echoed prompt, or only its tokens if they were asked for."""
        i = index // self.job.n
        if not self._echoes and not self.options.return_token_ids:
            return b""
        choice: dict[str, Any] = {"index": index, "text": "", "logprobs": None}
        choice |= {"finish_reason": None, "stop_reason": None}
        if self._echoes:
            choice["text"] = self._echoes[i].text
            if self.options.logprobs:
                choice["logprobs"] = self._logprobs(self._echo_entries(i, logprobs))
        if self.options.return_token_ids:
            choice |= {"token_ids": [], "prompt_token_ids": self.job.prompts[i].token_ids}
        return self._start + b',"choices":[' + encode(choice) + b"]" + self._usage_null + b"}\n\n"

    def whole(
        self, answers: Sequence[Answered], logprobs: Sequence[Sequence[TokenLogprobs] | None], num_cached_tokens: int
    ) -> bytes:
        """A ``text_completion`` object."""
        choices = []
        for answer in answers:
            i = answer.choice.index // self.job.n
            prompt = self.job.prompts[i]
            choice: dict[str, Any] = {"index": answer.choice.index, "text": answer.text, "logprobs": None}
            entries = self._entries(answer)
            if self._echoes:
                choice["text"] = self._echoes[i].text + answer.text
                if self.options.logprobs:
                    entries = self._echo_entries(i, logprobs[i]) + entries
            if self.options.logprobs:
                choice["logprobs"] = self._logprobs(entries)
            if self.options.return_token_ids:
                choice["prompt_token_ids"] = prompt.token_ids
            if self.options.show_prompt_logprobs:
                choice["prompt_logprobs"] = prompt_logprobs(prompt.token_ids, logprobs[i] or (), self.tokenizer)
            choices.append(choice)
        return self._whole(answers, choices, num_cached_tokens)


class ChatRenderer(Renderer):
    """``chat.completion`` objects."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    text_open = b'"delta":{"content":'
    text_close = b"}"

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return chat_logprobs(entries, self.tokenizer, self.num_top)

    def opening(self, index: int, logprobs: Sequence[TokenLogprobs] | None) -> bytes:  # noqa: ARG002 - completions need it
        """The role, which opens every chat stream."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        ids = b""
        if self.options.return_token_ids:
            ids = b',"prompt_token_ids":' + encode(self.job.prompts[0].token_ids)
        return self._start + b',"choices":[' + encode(choice) + b"]" + ids + self._usage_null + b"}\n\n"

    def whole(
        self, answers: Sequence[Answered], logprobs: Sequence[Sequence[TokenLogprobs] | None], num_cached_tokens: int
    ) -> bytes:
        """A ``chat.completion`` object."""
        choices = [
            {
                "index": answer.choice.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(self._entries(answer)) if self.options.logprobs else None,
            }
            for answer in answers
        ]
        extra: dict[str, Any] = {}
        token_ids = self.job.prompts[0].token_ids
        if self.options.return_token_ids:
            extra["prompt_token_ids"] = token_ids
        if self.options.show_prompt_logprobs:
            extra["prompt_logprobs"] = prompt_logprobs(token_ids, logprobs[0] or (), self.tokenizer)
        return self._whole(answers, choices, num_cached_tokens, extra)


async def renderer_for(job: Job) -> Renderer:
    """The renderer of the API the job came in by."""
    return ChatRenderer(job) if job.kind == "chat" else CompletionRenderer(job, await echoes_of(job))
