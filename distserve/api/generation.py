"""All choices of one HTTP request while the backend's items reach them: pieces out, times and metrics kept."""

from collections.abc import Callable

from distserve.api.backend import Backend
from distserve.api.choice import Choice, Piece
from distserve.api.detokenize import detokenizer_for
from distserve.api.errors import error_of_status
from distserve.api.job import Job
from distserve.api.metrics import Metrics
from distserve.api.timeline import RequestTimeline
from distserve.core.commands import Conclude, Deliver
from distserve.core.errors import RequestError
from distserve.core.request import FinishReason, TokenLogprobs, TokenOutput


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
        self._num_cached: dict[str, int] = {}

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

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of all prompts so far that were not computed, as an earlier request had begun alike."""
        return sum(self._num_cached.values())

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
        if request_id not in self._num_cached:  # a prompt is computed once for all its choices
            self._num_cached[request_id] = output.num_cached_tokens
            self._metrics.cached_tokens.inc(output.num_cached_tokens)
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
