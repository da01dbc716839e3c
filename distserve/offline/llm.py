"""``LLM``: batched and streaming generation within the caller's process.

The prompts of one call, of several threads and of streams are batched together, by the scheduler of a mixed instance
and on the engine that ``distserve serve --mixed 1`` runs. What is computed, checked and sampled is the same, so the
same seed gives the same text.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distserve.api.choice import Piece
from distserve.api.generation import Generation
from distserve.api.job import Job
from distserve.api.metrics import Metrics
from distserve.api.model import load_served_model
from distserve.cluster.clock import cluster_time
from distserve.cluster.local import LocalCluster
from distserve.core.config import PrefillPolicy
from distserve.core.errors import RequestError, UnavailableError
from distserve.core.router import RouterConfig
from distserve.demo import model_dir
from distserve.offline.background import Background
from distserve.offline.jobs import batch_of, checked_params, make_job, params_for
from distserve.offline.outputs import Delta, RequestOutput, delta_of, whole_choice
from distserve.offline.params import Prompt, SamplingParams
from distserve.offline.sizing import size_instance

_OUTSTANDING = 4
"""Prompts under way per place in the batch: enough for the scheduler to choose from, however many were given."""

_PATIENT = RouterConfig(max_wait=float("inf"))
"""Nothing is shed: who gave the prompts waits for them."""

Advance = Callable[[int], None]
"""Told of a prompt that has ended, and of how many output tokens it came to."""


class LLM:
    """A model, loaded into this process.

    ::

        from distserve import LLM, SamplingParams

        with LLM("./my-llama", dtype="bfloat16") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
                print(output.text)

    Safe to use from several threads, and within a running event loop (a notebook). Memory and threads are given back
    by :meth:`close`, at the end of a ``with``, and at the latest when the interpreter ends.

    Args:
        model: A Hugging Face model directory; the embedded demo model if None.
        dtype: ``float32`` or ``bfloat16``, of weights, activations and KV.
        max_model_len: Most tokens of prompt and output together; the model's if None.
        kv_tokens: KV memory in tokens; None sizes it by ``kv_memory``, or by what is free.
        kv_memory: KV memory in bytes, in place of ``kv_tokens``.
        block_size: Tokens per KV block.
        max_batch_tokens: The token budget: most tokens a step computes.
        max_batch_size: Most sequences that run at once.
        mixed_policy: ``splitfuse``, or ``whole`` for prompts that are never split, for comparison.
        prefix_caching: Share KV between prompts that begin alike.
        prefix_cache_tokens: Most KV kept for that while nobody uses it, in tokens; None: as long as memory lasts.
        threads: Threads that compute; all CPUs of this process if None.

    Raises:
        ConfigError: an option is wrong, the directory is no model's, or memory does not suffice.
        UnsupportedModelError: the model cannot be served exactly.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "float32",
        max_model_len: int | None = None,
        kv_tokens: int | None = None,
        kv_memory: float | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_batch_size: int = 64,
        mixed_policy: str = PrefillPolicy.SPLITFUSE,
        prefix_caching: bool = False,
        prefix_cache_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        options = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "kv_tokens": kv_tokens,
            "kv_memory": kv_memory,
            "block_size": block_size,
            "max_batch_tokens": max_batch_tokens,
            "max_batch_size": max_batch_size,
            "mixed_policy": mixed_policy,
            "prefix_caching": prefix_caching,
            "prefix_cache_tokens": prefix_cache_tokens,
            "threads": threads,
        }
        directory = Path(model) if model is not None else model_dir()
        instance = size_instance(directory, options)
        scheduler = instance.spec.scheduler
        self.model = load_served_model(
            directory, max_model_len=min(scheduler.max_model_len, instance.spec.kv.num_tokens)
        )
        """Name, limits and tokenizer."""
        self._max_outstanding = _OUTSTANDING * scheduler.max_batch_size
        self._background = Background(
            LocalCluster(
                directory,
                prefill=0,
                decode=0,
                mixed=1,
                dtype=instance.dtype,
                kv=instance.spec.kv,
                scheduler=scheduler,
                num_threads=instance.num_threads,
                router=_PATIENT,
            )
        )
        self._backend = self._background.backend
        self._metrics = Metrics(self.model.names[0], self._backend.status)
        # Also when the interpreter ends: an engine thread must not compute through its last moments.
        self._finalizer = weakref.finalize(self, self._background.close)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer ``prompts``, one or many, each a text, token ids or a conversation; outputs in their order.

        All prompts are checked before any is computed. Ctrl-C gives up what is under way and leaves the model usable.

        Args:
            prompts: One prompt or any number.
            sampling_params: Options for all prompts, or one per prompt.
            progress: Show a bar on standard error; None shows it on a terminal, where there are several prompts.

        Raises:
            InvalidRequestError: a prompt or an option is wrong.
            RequestError: a prompt could not be answered, for example because the model's logits overflowed.
        """
        self._check_open()
        given = batch_of(prompts)
        params = params_for(given, sampling_params)
        with _bar(len(given), wanted=progress) as advance:
            return self._background.run(self._generate(given, params, advance))

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Answer one prompt token by token: ``async for delta in llm.stream(prompt): ...``.

        Any number of streams may be under way, in any event loop. One that is left early (``break``, a cancelled task)
        is given up within a step. Raises as :meth:`generate` does.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Delta | None] = asyncio.Queue()

        def put(delta: Delta | None) -> None:
            # A loop that is closed has nobody left who reads.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, delta)

        async def produce() -> None:
            try:
                job = await self._job(prompt, checked_params(sampling_params), stream=True)
                await self._answer(job, lambda index, piece: put(delta_of(index, piece)))
            finally:
                put(None)

        producer = self._background.spawn(produce())
        try:
            while (delta := await inbox.get()) is not None:
                yield delta
            await asyncio.wrap_future(producer)
        finally:
            producer.cancel()

    def metrics(self) -> str:
        """Counters and latencies since the start in Prometheus' text format, as ``GET /metrics`` has them."""
        return self._metrics.expose().decode()

    def close(self) -> None:
        """Give memory and threads back; streams under way end with UnavailableError. Closing again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UnavailableError("this LLM is closed: make a new one")

    # -- on the background loop ---------------------------------------------------------------------------------------

    async def _job(self, prompt: Prompt, params: SamplingParams, *, stream: bool = False) -> Job:
        return await make_job(prompt, params, self.model, self._backend.owner_id, cluster_time(), stream=stream)

    async def _generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], advance: Advance
    ) -> list[RequestOutput]:
        jobs = [await self._job(*pair) for pair in zip(prompts, params, strict=True)]
        outputs: list[RequestOutput | None] = [None] * len(jobs)
        left = iter(enumerate(jobs))

        async def work() -> None:
            for at, job in left:
                outputs[at] = output = await self._whole(job)
                advance(sum([len(choice.token_ids) for choice in output.outputs]))

        workers = [asyncio.create_task(work()) for _ in range(min(len(jobs), self._max_outstanding))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [output for output in outputs if output is not None]

    async def _whole(self, job: Job) -> RequestOutput:
        pieces: list[list[Piece]] = [[] for _ in range(job.n)]
        generation = await self._answer(job, lambda index, piece: pieces[index].append(piece))
        (prompt,), (prompt_logprobs,) = job.prompts, generation.prompt_logprobs
        return RequestOutput(
            prompt=prompt.text,
            prompt_token_ids=tuple(prompt.token_ids),
            outputs=tuple([whole_choice(index, each) for index, each in enumerate(pieces)]),
            prompt_logprobs=prompt_logprobs if job.options.show_prompt_logprobs else None,
        )

    async def _answer(self, job: Job, take: Callable[[int, Piece], None]) -> Generation:
        """Serve a job of one prompt. However this ends, nothing is held for it afterwards."""
        generation = Generation(job, self._backend, self._metrics, cluster_time)
        (request,) = job.requests
        self._metrics.on_prompt(len(request.prompt_token_ids))
        outcome = "abandoned"
        try:
            async for item in self._backend.submit(request):
                for choice, piece in generation.advance([item]):
                    take(choice.index, piece)
            outcome = "ok" if generation.failure is None else str(generation.failure.status)
        except RequestError as error:
            outcome = str(error.status)
            raise
        finally:
            self._backend.abandon(request.request_id)
            self._metrics.on_outcome(outcome)
        if generation.failure is not None:
            raise generation.failure
        self._metrics.e2e.observe(cluster_time() - job.arrival)
        return generation


def _bar(num_prompts: int, *, wanted: bool | None) -> AbstractContextManager[Advance]:
    console = Console(stderr=True)
    if wanted or (wanted is None and console.is_terminal and num_prompts > 1):
        return _shown_bar(num_prompts, console)
    return nullcontext(lambda _: None)


@contextmanager
def _shown_bar(num_prompts: int, console: Console) -> Iterator[Advance]:
    columns: tuple[Any, ...] = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("prompts", total=num_prompts, speed="")
        start, num_tokens = cluster_time(), 0

        def advance(more: int) -> None:
            nonlocal num_tokens
            num_tokens += more
            bar.update(task, advance=1, speed=f"{num_tokens / max(1e-9, cluster_time() - start):,.0f} tokens/s")

        yield advance
