"""The response to a generation request: runs its job on the backend while it is being sent.

All of a request's life happens inside ``__call__``: whatever ends it, the backend is told before the scope is left.
Errors before the first byte become HTTP errors, later ones an error event.
"""

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distserve.api.backend import Backend
from distserve.api.choice import Choice, Piece
from distserve.api.detokenize import detokenizer_for
from distserve.api.errors import error_body, error_of_status
from distserve.api.exchange import ClientGoneError, Exchange
from distserve.api.job import Job
from distserve.api.metrics import Metrics
from distserve.api.render import DONE, Answered, Renderer, renderer_for
from distserve.api.timeline import RequestTimeline
from distserve.core.commands import Conclude, Deliver
from distserve.core.errors import RequestError
from distserve.core.request import FinishReason, TokenLogprobs, TokenOutput

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in front must not collect events
]


class Generation:
    """The job's choices as the backend's items reach them."""

    def __init__(self, job: Job, backend: Backend, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._metrics = metrics
        self._clock = clock
        self._n = job.n
        self._position = {request.request_id: i for i, request in enumerate(job.requests)}
        self.choices = [self._choice(job, index) for index in range(job.n * len(job.requests))]
        self.failure: RequestError | None = None
        self.prompt_logprobs: list[tuple[TokenLogprobs, ...] | None] = [None] * len(job.requests)

    def _choice(self, job: Job, index: int) -> Choice:
        request, options = job.requests[index // job.n], job.options
        detokenizer = detokenizer_for(
            job.model.tokenizer, request.prompt_token_ids, skip_special_tokens=options.skip_special_tokens
        )
        return Choice(
            index,
            detokenizer,
            request.sampling,
            RequestTimeline(job.arrival),
            stops=options.stops,
            include_stop=options.include_stop,
            silent=options.echo_only,
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)

    def advance(self, items: list[Deliver | Conclude]) -> list[tuple[Choice, Piece]]:
        """Take what came in. Sets ``failure`` when the cluster gave a request up."""
        now = self._clock()
        pieces: list[tuple[Choice, Piece]] = []
        for item in items:
            if isinstance(item, Conclude):
                self._conclude(item, now, pieces)
                continue
            first = self._position[item.request_id] * self._n
            for output in item.outputs:
                choice = self.choices[first + output.choice]
                if choice.finish_reason is None:  # else tokens have overrun a stop string
                    pieces.append((choice, self._accept(item.request_id, choice, output, now)))
        self._metrics.output_tokens.inc(sum(piece.token_id is not None for _, piece in pieces))
        return pieces

    def _accept(self, request_id: str, choice: Choice, output: TokenOutput, now: float) -> Piece:
        if output.marks:
            self._note_marks(request_id, choice, output)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[self._position[request_id]] = output.prompt_logprobs
        times = choice.timeline.token_times
        if times:
            self._metrics.itl.observe(now - times[-1])
        elif output.choice == 0:
            self._metrics.ttft.observe(now - choice.timeline.arrival)
        times.append(now)
        piece = choice.accept(output)
        if output.finish_reason is None and piece.finish_reason is not None:
            self._backend.stop(request_id, output.choice, choice.num_tokens)
        if piece.finish_reason is not None:
            self._end(choice, now)
        return piece

    def _note_marks(self, request_id: str, choice: Choice, output: TokenOutput) -> None:
        choice.timeline.note(output.marks)
        # The prompt is prefilled once for all its choices.
        shared = [mark for mark in output.marks if mark[0].startswith("prefill")]
        first = self._position[request_id] * self._n
        for other in self.choices[first : first + self._n]:
            other.timeline.note(shared)

    def _conclude(self, item: Conclude, now: float, pieces: list[tuple[Choice, Piece]]) -> None:
        if item.status != 200:
            self.failure = error_of_status(item.status, item.reason, item.retry_after)
            return
        first = self._position[item.request_id] * self._n
        for choice in self.choices[first : first + self._n]:
            if choice.finish_reason is None:
                pieces.append((choice, choice.conclude(item.finish or FinishReason.ABORT)))
                self._end(choice, now)

    def _end(self, choice: Choice, now: float) -> None:
        choice.timeline.finish = now
        assert choice.finish_reason is not None
        self._metrics.on_choice_end(choice.timeline, choice.num_tokens, choice.finish_reason)


class StreamBrokenError(Exception):
    """A stream ended with an error event."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.outcome = str(error.status)


class Answer(Response):
    """Serves ``job`` and answers, streaming or whole."""

    def __init__(self, job: Job, backend: Backend, metrics: Metrics, clock: Callable[[], float]) -> None:
        super().__init__(media_type="application/json")
        self._job = job
        self._backend = backend
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Run the job; raises RequestError only while nothing has been sent."""
        outcome = "500"
        run = self._stream if self._job.options.stream else self._whole
        try:
            generation = Generation(self._job, self._backend, self._metrics, self._clock)
            renderer = renderer_for(self._job)
            for request in self._job.requests:
                self._metrics.on_prompt(len(request.prompt_token_ids))
            async with Exchange(self._backend, self._job.requests, receive) as exchange:
                await run(exchange, generation, renderer, send)
            self._metrics.e2e.observe(self._clock() - self._job.arrival)
            outcome = "ok"
        except ClientGoneError:
            outcome = "abandoned"
        except StreamBrokenError as broken:
            outcome = broken.outcome
        except RequestError as error:
            outcome = str(error.status)
            raise
        finally:
            self._metrics.on_outcome(outcome)

    async def _whole(self, exchange: Exchange, generation: Generation, renderer: Renderer, send: Send) -> None:
        answers = [Answered(choice) for choice in generation.choices]
        while not exchange.concluded:
            for choice, piece in generation.advance(await exchange.receive()):
                answers[choice.index].pieces.append(piece)
            if generation.failure is not None:
                raise generation.failure
        body = renderer.whole(answers, generation.prompt_logprobs)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self._job.job_id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, exchange: Exchange, generation: Generation, renderer: Renderer, send: Send) -> None:
        # Whether there will be an answer at all shows with the first item: only then can the status be 200.
        pieces = generation.advance(await exchange.receive())
        if generation.failure is not None:
            raise generation.failure
        headers = [*STREAM_HEADERS, (b"x-request-id", self._job.job_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        opened: set[int] = set()
        while True:
            events: list[bytes] = []
            for choice, piece in pieces:
                if choice.index not in opened:
                    opened.add(choice.index)
                    prompt_logprobs = generation.prompt_logprobs[choice.index // self._job.n]
                    events.append(renderer.opening(choice.index, prompt_logprobs))
                events.append(renderer.event(choice, piece))
            if events:
                # Everything that is ready leaves in one write.
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
            if exchange.concluded or generation.failure is not None:
                break
            pieces = generation.advance(await exchange.receive())
        last = DONE
        if generation.failure is not None:
            last = b"data: " + error_body(generation.failure) + b"\n\n" + DONE
        elif self._job.options.include_usage:
            last = renderer.usage(generation.num_output_tokens) + DONE
        await send({"type": "http.response.body", "body": last})
        if generation.failure is not None:
            raise StreamBrokenError(generation.failure)
