"""A scripted stand-in for the cluster: yields prepared tokens, keeps a log of what it was told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from distserve.core.commands import Conclude, Deliver
from distserve.core.config import InstanceSpec, KvConfig, Role
from distserve.core.messages import Report, Status
from distserve.core.request import FinishReason, Request, TokenLogprobs, TokenOutput

Script = Callable[[Request, int], Sequence[int]]
"""Tokens that a choice would generate if nothing ended it."""


def pool_status(*roles: Role) -> Status:
    instances = []
    for i, role in enumerate(roles):
        spec = InstanceSpec(f"{role.value}-{i}", role, KvConfig(num_blocks=100))
        report = Report(
            spec.instance_id,
            3,
            40,
            2,
            75,
            9,
            num_preempted=1,
            num_pulls=4,
            pulled_bytes=4096,
            pull_seconds=0.5,
            num_queried_tokens=100,
            num_hit_tokens=60,
        )
        instances.append((spec, report))
    return Status(tuple(instances))


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """Made up but recognisable: the chosen token ranks second behind token 7."""
    top = ((7, -0.5), (token_id, -1.0), (8, float("-inf")))
    return TokenLogprobs(-1.0, 2, top[:num_top])


def end_of(request: Request, tokens: Sequence[int], index: int) -> FinishReason | None:
    sampling = request.sampling
    if index + 1 >= sampling.min_tokens and tokens[index] in sampling.end_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if index + 1 == sampling.max_tokens else None


@dataclass
class FakeBackend:
    """Generates ``script``'s tokens, one per choice and step, ``delay`` seconds apart, ``burst`` tokens at a time.

    ``verdict`` concludes every request at once; ``verdict_after`` steps later if set.
    """

    script: Script
    delay: float = 0.0
    burst: int = 1
    verdict: Conclude | None = None
    verdict_after: int = 0
    hang: bool = False
    num_cached_tokens: int = 0
    owner_id: str = "owner-0"
    current: Status | None = field(default_factory=lambda: pool_status(Role.PREFILL, Role.DECODE))
    submitted: list[Request] = field(default_factory=list)
    stopped: list[tuple[str, int, int]] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    concluded: list[str] = field(default_factory=list)

    async def submit(self, request: Request) -> AsyncIterator[Deliver | Conclude]:
        self.submitted.append(request)
        if self.verdict is not None and self.verdict_after == 0:
            yield replace(self.verdict, request_id=request.request_id)
            return
        if self.hang:
            await asyncio.Event().wait()
        scripts = {choice: list(self.script(request, choice)) for choice in request.choices}
        index = 0
        while scripts and not self._over(request, scripts):
            if self.verdict is not None and index >= self.verdict_after:
                yield replace(self.verdict, request_id=request.request_id)
                return
            await asyncio.sleep(self.delay)
            outputs = []
            for _ in range(self.burst):
                self._over(request, scripts)
                for choice in list(scripts):
                    outputs.append(self._output(request, choice, index, scripts[choice]))
                    if outputs[-1].finish_reason is not None:
                        del scripts[choice]
                index += 1
            yield Deliver(request.request_id, tuple(outputs))
        self.concluded.append(request.request_id)
        yield Conclude(request.request_id)

    def _over(self, request: Request, scripts: dict[int, list[int]]) -> bool:
        for request_id, choice, _ in self.stopped:
            if request_id == request.request_id:
                scripts.pop(choice, None)
        return not scripts

    def _output(self, request: Request, choice: int, index: int, tokens: list[int]) -> TokenOutput:
        sampling = request.sampling
        finish = end_of(request, tokens, index)
        token_id = tokens[index]
        prompt = request.prompt_token_ids
        first = index == 0
        return TokenOutput(
            request.request_id,
            0,
            choice,
            index,
            token_id,
            logprobs=None if sampling.logprobs is None else logprobs_of(token_id, sampling.logprobs),
            finish_reason=finish,
            stop_token_id=token_id if finish is FinishReason.STOP else None,
            marks=self._marks(request, index),
            prompt_logprobs=tuple(logprobs_of(i, sampling.prompt_logprobs or 0) for i in prompt[1:])
            if first and choice == request.choices[0] and sampling.prompt_logprobs is not None
            else None,
            num_cached_tokens=self.num_cached_tokens if first else 0,
        )

    def _marks(self, request: Request, index: int) -> tuple[tuple[str, float], ...]:
        t = request.arrival
        if index == 0:
            return (("prefill_start", t + 0.1), ("prefill_end", t + 0.3))
        if index == 1:
            return (("migration_start", t + 0.3), ("migration_end", t + 0.35), ("decode_start", t + 0.4))
        return ()

    def stop(self, request_id: str, choice: int, num_tokens: int) -> None:
        self.stopped.append((request_id, choice, num_tokens))

    def abandon(self, request_id: str) -> None:
        self.abandoned.append(request_id)

    def status(self) -> Status | None:
        return self.current
