"""The response to a generation request: runs its job on the backend while it is being sent.

All of a request's life happens inside ``__call__``: whatever ends it, the backend is told before the scope is left.
Errors before the first byte become HTTP errors, later ones an error event.
"""

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distserve.api.backend import Backend
from distserve.api.error_responses import error_body
from distserve.api.exchange import ClientGoneError, Exchange
from distserve.api.generation import Generation
from distserve.api.job import Job
from distserve.api.metrics import Metrics
from distserve.api.render import DONE, Answered, Renderer, renderer_for
from distserve.core.errors import RequestError

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in front must not collect events
]


class Answer(Response):
    """Serves ``job`` and answers, streaming or whole."""

    def __init__(self, job: Job, backend: Backend, metrics: Metrics, clock: Callable[[], float]) -> None:
        super().__init__(media_type="application/json")
        self._job = job
        self._backend = backend
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI passes it
        """Run the job; raises RequestError only while nothing has been sent."""
        outcome = "500"
        run = self._stream if self._job.options.stream else self._whole
        try:
            generation = Generation(self._job, self._backend, self._metrics, self._clock)
            renderer = await renderer_for(self._job)
            for request in self._job.requests:
                self._metrics.on_prompt(len(request.prompt_token_ids))
            async with Exchange(self._backend, self._job.requests, receive) as exchange:
                await run(exchange, generation, renderer, send)
            if generation.failure is None:
                outcome = "ok"
                self._metrics.e2e.observe(self._clock() - self._job.arrival)
            else:
                outcome = str(generation.failure.status)
        except ClientGoneError:
            outcome = "abandoned"
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
        body = renderer.whole(answers, generation.prompt_logprobs, generation.num_cached_tokens)
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
            last = renderer.usage(generation.num_output_tokens, generation.num_cached_tokens) + DONE
        await send({"type": "http.response.body", "body": last})
