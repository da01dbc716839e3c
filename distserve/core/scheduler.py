"""What schedulers of every role share: steps in flight, sequences' ends, tokens to owners, load reports.

A scheduler is local to its instance and deterministic. :meth:`InstanceScheduler.handle` takes one event, lets the
role react, then launches as many steps as may be in flight, then sends what the event produced. A role adds how
batches are formed and what becomes of a sampled token.

Rules every role keeps:

- A sequence is in one batch at a time, lookahead aside.
- Blocks are released once no step in flight uses them: a step may still write into the blocks of an aborted sequence.
- What a step computes can be found by others from the moment it is in a batch, as in vLLM: an engine runs its steps in
  order, and within one it writes each layer's KV before it reads any. If the step fails, its readers fail with it.
- The engine hears ``OpenSequence`` before a sequence's first chunk and ``CloseSequence`` after its last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import islice

from distserve.core.block_manager import BlockManager
from distserve.core.commands import (
    Chunk,
    CloseSequence,
    Command,
    OpenSequence,
    RunStep,
    Send,
    TableUpdate,
    WakeAt,
)
from distserve.core.config import InstanceSpec, Role
from distserve.core.events import NOT_FINITE, Event, Migrated, Received, StepDone, StepFailed, Timer, UnseenStepDone
from distserve.core.messages import Abort, Failed, Message, Preempted, Report, RequestKey, Tokens
from distserve.core.pace import Pace
from distserve.core.report_timer import ReportTimer
from distserve.core.request import Request, TokenLogprobs, TokenOutput
from distserve.core.sequence import Sequence
from distserve.core.strays import answer_stray
from distserve.core.totals import Totals

ROUTER = "router"
"""The router's name, to which every part speaks."""

UNSEEN = 0
"""Stands for a token that nobody looks at."""


class Batch:
    """A step being formed or in flight: ``entries`` are (sequence, tokens, samples) in chunk order.

    ``labelled`` are blocks that can be found by what this step computes.
    """

    # No dataclass, as a Sequence is none.
    def __init__(
        self,
        entries: list[tuple[Sequence, int, bool]],
        chunks: tuple[Chunk, ...],
        copies: list[tuple[int, int]],
        num_tokens: int,
        labelled: list[int] | None = None,
    ) -> None:
        self.entries = entries
        self.chunks = chunks
        self.copies = copies
        self.num_tokens = num_tokens
        self.labelled: list[int] = [] if labelled is None else labelled
        self.start = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are not sequences' last ones: a prompt's, to within one."""
        return self.num_tokens - len(self.entries)


class InstanceScheduler(ABC):
    """Base of the role's schedulers: a machine in the sense of :class:`distserve.core.events.Machine`."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self._config = spec.scheduler
        self._max_in_flight = spec.scheduler.max_in_flight
        kept = spec.scheduler.prefix_cache_tokens
        self.blocks = BlockManager(spec.kv.num_blocks, None if kept is None else kept // spec.kv.block_size)
        self._now = 0.0
        self._commands: list[Command] = []
        self._sends: list[Command] = []
        self._tokens: dict[str, list[TokenOutput]] = {}
        self._steps: dict[int, Batch] = {}
        self._next_step_id = 0
        self._next_seq_id = 0
        self._next_pull_id = 0
        self._gone: set[str] = set()
        """Instances lost: an offer of theirs may still be on its way."""
        self.becoming: Role | None = None
        """The role that the instance changes to once nothing is left here."""
        self.totals = Totals()
        self._pace = Pace()
        self._seen: list[RequestKey] = []
        """Attempts received since the last report."""
        self._report_timer = ReportTimer(spec.scheduler)
        self._deadline = float("inf")
        """When :meth:`_on_deadline` is called next (seconds): a timer pends for it."""

    @abstractmethod
    def horizon(self) -> int:
        """Steps, the next one included, over which no batch can change: no message and no end token provided."""

    def steady_steps(self) -> int:
        """Steps after the one in flight whose batch will be the very same; bounds :meth:`skip`.

        No message and no end token provided, as for :meth:`horizon`. 0 unless exactly one step is in flight.
        """
        return 0

    def skip(self, ends: SequenceOf[float]) -> None:
        """Stand where so many ``ends`` of the step in flight would have led: its like is in flight once more.

        They are the times (seconds) at which the steps ended. A simulator's short cut over steps that nothing can
        change, at most :meth:`steady_steps` of them.
        """
        raise AssertionError(f"{self.spec.role} instances have no steady steps: skip({len(ends)})")

    # -- the role's part ------------------------------------------------------------------------------------------

    @abstractmethod
    def _on_message(self, sender: str, message: Message) -> None:
        """A message came for this instance."""

    @abstractmethod
    def _on_token(self, seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        """A live sequence sampled: one token per choice."""

    @abstractmethod
    def _form_batch(self) -> Batch | None:
        """The next step as the role would have it, its memory allocated; None: nothing may start now."""

    @abstractmethod
    def _load(self) -> tuple[int, int, int]:
        """(sequences waiting, prompt tokens waiting, sequences running)."""

    @abstractmethod
    def _find(self, key: RequestKey, choice: int | None) -> Iterable[Sequence]:
        """Live sequences of an attempt, or of one of its choices."""

    @abstractmethod
    def _forget(self, seq: Sequence) -> None:
        """Drop the sequence from the role's own queues and tables."""

    def _wake_by(self, time: float) -> None:
        """Have :meth:`_on_deadline` called at ``time`` (seconds; infinite: never) or before."""
        if time < self._deadline:
            self._deadline = time
            self._commands.append(WakeAt(time))

    def _on_deadline(self) -> None:
        """The role's earliest deadline is due: it does what is, and asks to be woken by the earliest of the rest."""

    def _on_migrated(self, event: Migrated) -> None:
        raise AssertionError(f"{self.spec.role} instances pull nothing: {event}")

    @abstractmethod
    def _live(self) -> list[Sequence]:
        """Every sequence that has not ended."""

    # -- changes of role --------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Nothing is left: no sequence, no step or pull under way, no block in use."""
        num_waiting, _, num_running = self._load()
        return not (self._steps or num_waiting or num_running) and self.blocks.num_free == self.blocks.num_blocks

    def hand_back(self, now: float) -> list[Command]:
        """Give up every sequence: their owners resubmit them, with the tokens they have."""
        self._now = now
        for seq in self._live():
            for choice in seq.choices:
                self._send(seq.request.owner_id, Preempted(seq.request.key, choice))
            if self._config.prefix_caching and seq.is_open:
                self._label_done(seq)
            self._close(seq)
        self._flush()
        commands, self._commands = self._commands, []
        return commands

    def succeed(self, former: InstanceScheduler) -> None:
        """Go on where the scheduler of another role has ended: engine, memory and what it holds are the same.

        Steps, sequences and pulls are numbered on, as engine and transport want; totals are since the instance started.
        """
        assert former.is_idle, "somebody still needs the former role"
        self.blocks = former.blocks
        self._next_step_id = former._next_step_id
        self._next_seq_id = former._next_seq_id
        self._next_pull_id = former._next_pull_id
        self._gone = former._gone
        self.totals = former.totals
        self.totals.num_role_changes += 1

    def _on_stray(self, sender: str, message: Message) -> None:
        """A message that only another role understands: the instance had it, or its sender thinks so."""
        if self.becoming is None and self.totals.num_role_changes == 0:
            raise AssertionError(f"not for a {self.spec.role} instance: {message}")
        answer = answer_stray(sender, message)
        if answer is not None:
            self._send(*answer)

    # -- events ---------------------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take one event; see :class:`distserve.core.events.Machine`."""
        self._now = now
        # Records have no subclasses, and isinstance() asks a struct's class for what its type says at once.
        if type(event) is Received:
            self._on_message(event.sender, event.message)
        elif type(event) is Timer:
            if now >= self._deadline:
                self._deadline = float("inf")
                self._on_deadline()
        elif type(event) is StepDone:
            self._on_step_done(event)
        elif type(event) is UnseenStepDone:
            self._on_unseen_step_done(event.step_id)
        elif type(event) is Migrated:
            self._on_migrated(event)
        elif type(event) is StepFailed:
            self._on_step_failed(event)
        else:
            raise AssertionError(f"not an instance's event: {event}")
        if len(self._steps) < self._max_in_flight:
            self._launch_steps()
        self._flush()
        commands, self._commands = self._commands, []
        return commands

    def _on_step_done(self, event: StepDone) -> None:
        batch = self._end_step(event.step_id)
        self._count(batch)
        for seq_id, entries in event.prompt_logprobs:
            for seq, _, _ in batch.entries:
                if seq.seq_id == seq_id:
                    seq.prompt_logprobs.extend(entries)
        position = 0
        for seq, _, samples in batch.entries:
            seq.num_in_flight -= 1
            tokens: tuple[int, ...] = ()
            logprobs: tuple[TokenLogprobs | None, ...] = ()
            if samples:
                count = len(seq.choices)
                tokens = event.tokens[position : position + count]
                if event.logprobs is not None:
                    logprobs = event.logprobs[position : position + count]
                position += count
            if seq.is_closed:
                self._settle(seq)
            elif NOT_FINITE in tokens:
                # Weights or activations overflowed: the same tokens would give the same logits anywhere.
                self._fail(seq, "the model's logits are not finite", status=500)
            elif samples:
                self._on_token(seq, tokens, logprobs or (None,) * len(tokens))
        assert position == len(event.tokens), "the engine returned a different number of tokens than it was asked for"

    def _on_unseen_step_done(self, step_id: int) -> None:
        batch = self._end_step(step_id)
        self._count(batch)
        for seq, _, samples in batch.entries:
            seq.num_in_flight -= 1
            if seq.is_closed:
                self._settle(seq)
            elif samples:
                self._on_unseen_token(seq)

    def _on_unseen_token(self, seq: Sequence) -> None:
        """Like :meth:`_on_token`, of tokens that nobody looks at."""
        count = len(seq.choices)
        self._on_token(seq, (UNSEEN,) * count, (None,) * count)

    def _on_step_failed(self, event: StepFailed) -> None:
        batch = self._end_step(event.step_id)
        lost = set(batch.labelled)
        self.blocks.forget(lost)
        for seq, _, _ in batch.entries:
            seq.num_in_flight -= 1
            if seq.is_closed:
                self._settle(seq)
            else:
                self._fail(seq, event.reason)
        for later in self._steps.values():
            # Of its sequences some may go on from what is lost; what the others compute will be found no more either.
            self.blocks.forget(later.labelled)
            for seq, _, _ in later.entries:
                if not (seq.is_closed or lost.isdisjoint(seq.blocks)):
                    lost |= set(later.labelled).intersection(seq.blocks)
                    self._fail(seq, event.reason)
        self._on_blocks_lost(lost, event.reason)

    def _on_blocks_lost(self, lost: set[int], reason: str) -> None:
        """Whoever has blocks of those ``lost`` and is in no step has nothing to go on from."""

    def _end_step(self, step_id: int) -> Batch:
        batch = self._steps.pop(step_id)
        for source, _ in batch.copies:
            self.blocks.unhold(source)
        return batch

    def _count(self, batch: Batch) -> None:
        self._pace.count(
            batch.start, self._now, batch.num_tokens, batch.num_prompt_tokens, is_queued=self._config.lookahead
        )

    # -- prefixes -------------------------------------------------------------------------------------------------

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Blocks with the head of a sequence that is to start, as far as somebody has computed it.

        Never all of it: the last token's logits are wanted, and a shared block is not written. Log-probabilities of a
        prompt come from computing all of it.
        """
        if not seq.keys or seq.request.sampling.prompt_logprobs is not None:
            return []
        return self.blocks.find(islice(seq.keys, (seq.num_tokens - 1) // self.spec.kv.block_size))

    def _take_blocks(self, seq: Sequence, shared: list[int]) -> None:
        """Give a sequence that starts all its blocks, those of its head ``shared``."""
        kv = self.spec.kv
        self.blocks.claim(shared)
        seq.num_labelled = len(shared)
        seq.num_computed = len(shared) * kv.block_size
        seq.blocks = shared + self.blocks.allocate(kv.blocks_for(seq.num_tokens) - len(shared))
        looked = self._config.prefix_caching and seq.request.sampling.prompt_logprobs is None
        if looked and not seq.is_recomputed:
            seq.num_cached = seq.num_computed
            self.totals.num_queried_tokens += seq.num_tokens
            self.totals.num_hit_tokens += seq.num_computed

    def _label(self, seq: Sequence, num_tokens: int, labelled: list[int]) -> None:
        """Let its full blocks be found, as far as ``num_tokens`` go; those that are go into ``labelled``."""
        start, end = seq.num_labelled, num_tokens // self.spec.kv.block_size
        if start < end:
            seq.extend_keys(end, self.spec.kv.block_size)
            labelled += self.blocks.label(seq.blocks[start:end], seq.keys[start:end])
            seq.num_labelled = end

    def _label_all(self, seq: Sequence) -> None:
        """Let everything it has computed, or steps in flight will have, be found: it is about to give its blocks up."""
        newest = next(reversed(self._steps.values())).labelled if self._steps else []
        self._label(seq, min(seq.num_computed, seq.num_tokens), newest)

    def _label_done(self, seq: Sequence) -> None:
        """Let what steps that have ended computed of it be found; its later steps take one token each."""
        self._label(seq, min(seq.num_computed - seq.num_in_flight, seq.num_tokens), [])

    # -- a sequence's life ----------------------------------------------------------------------------------------

    def _new_seq_id(self) -> int:
        self._next_seq_id += 1
        return self._next_seq_id

    def _prompt_of(self, request: Request) -> Sequence:
        """A prompt that has come, with its keys made and a note of how much would not be computed if it started now."""
        seq = Sequence(
            seq_id=self._new_seq_id(),
            request=request,
            choices=request.choices,
            num_tokens=request.num_prefill_tokens,
            num_output=len(request.output_token_ids),
            output_token_ids=list(request.output_token_ids),
        )
        if self._config.prefix_caching:
            seq.extend_keys(seq.num_tokens // self.spec.kv.block_size, self.spec.kv.block_size)
            seq.num_expected = len(self._find_prefix(seq)) * self.spec.kv.block_size
        return seq

    def _open(self, seq: Sequence, output_token_ids: tuple[int, ...]) -> None:
        """Tell the engine of the sequence; what is computed so far is in its blocks."""
        assert not seq.is_open
        seq.is_open = True
        self._commands.append(OpenSequence(seq.seq_id, seq.request, seq.choices, output_token_ids, seq.num_computed))

    def _close(self, seq: Sequence) -> None:
        """The sequence ends here: nothing it still computes counts. Its blocks go as soon as no step uses them."""
        assert not seq.is_closed
        seq.is_closed = True
        self._forget(seq)
        self._settle(seq)

    def _settle(self, seq: Sequence) -> None:
        if seq.num_in_flight > 0:
            return
        self.blocks.release(seq.blocks)
        seq.blocks = []
        if seq.is_open:
            seq.is_open = False
            self._commands.append(CloseSequence(seq.seq_id))

    def _abort(self, key: RequestKey, choice: int | None) -> None:
        for seq in list(self._find(key, choice)):
            if self._config.prefix_caching and seq.is_open:
                self._label_done(seq)  # a stop string ends a choice this way: the next turn begins with it
            self._close(seq)

    def _fail(self, seq: Sequence, reason: str, status: int | None = None) -> None:
        self._send(seq.request.owner_id, Failed(seq.request.key, reason, status))
        self._close(seq)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _launch_steps(self) -> None:
        while len(self._steps) < self._max_in_flight:
            batch = self._form_batch()
            if batch is None:
                return
            step_id = self._next_step_id
            self._next_step_id += 1
            batch.start = self._now
            self._steps[step_id] = batch
            updates = []
            for seq, num_tokens, _ in batch.entries:
                seq.num_in_flight += 1
                seq.num_computed += num_tokens
                if seq.num_published < len(seq.blocks):
                    start = seq.num_published
                    updates.append(TableUpdate(seq.seq_id, start, tuple(seq.blocks[start:])))
                    seq.num_published = len(seq.blocks)
            self._commands.append(RunStep(step_id, batch.chunks, tuple(updates), tuple(batch.copies)))
            self._on_launched(step_id, batch)

    def _on_launched(self, step_id: int, batch: Batch) -> None:
        """The role may prepare what follows the step while it runs."""

    # -- what leaves ----------------------------------------------------------------------------------------------

    def _send(self, to: str, message: Message) -> None:
        self._sends.append(Send(to, message))

    def _emit(
        self,
        seq: Sequence,
        choice: int,
        token_id: int,
        logprobs: TokenLogprobs | None,
        prompt_logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> bool:
        """Send the newest token, already counted in ``num_output``, to the owner; True if it ends the choice."""
        reason, stop_token_id = seq.finish_reason(token_id)
        output = TokenOutput(
            request_id=seq.request.request_id,
            attempt=seq.request.attempt,
            choice=choice,
            index=seq.num_output - 1,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            marks=seq.marks,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=seq.num_cached if seq.num_output == 1 else 0,
        )
        seq.marks = ()
        self._tokens.setdefault(seq.request.owner_id, []).append(output)
        return reason is not None

    def _flush(self) -> None:
        """Steps were appended first, so that the engine is busy while messages travel; one Tokens message per owner."""
        if self._tokens:
            for owner_id, outputs in self._tokens.items():
                self._commands.append(Send(owner_id, Tokens(tuple(outputs))))
            self._tokens.clear()
        if self._sends:
            self._commands += self._sends
            self._sends.clear()
        self._report()

    def _report(self) -> None:
        waiting, waiting_tokens, running = self._load()
        # Blocks that running sequences grow by are no news: the next report names them.
        state = (waiting, waiting_tokens, running, len(self._seen))
        timer = self._report_timer
        if timer.is_settled(self._now, state):
            return
        if timer.is_due(self._now, state):
            self._commands.append(Send(ROUTER, self._make_report(waiting, waiting_tokens, running)))
            self._seen.clear()
            timer.reported(self._now, (waiting, waiting_tokens, running, 0))
        wake = timer.next_wake(self._now)
        if wake is not None:
            self._commands.append(WakeAt(wake))

    def _make_report(self, num_waiting: int, num_waiting_tokens: int, num_running: int) -> Report:
        pace, totals = self._pace, self.totals
        return Report(
            instance_id=self.spec.instance_id,
            num_waiting=num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            num_running=num_running,
            num_free_blocks=self.blocks.num_free,
            seen=tuple(self._seen),
            prefill_rate=pace.prefill_rate,
            step_seconds=pace.step_seconds,
            prompt_rate=pace.prompt_rate,
            prompt_seconds=pace.prompt_seconds,
            num_preempted=totals.num_preempted,
            num_pulls=totals.num_pulls,
            pulled_bytes=totals.pulled_bytes,
            pull_seconds=totals.pull_seconds,
            num_queried_tokens=totals.num_queried_tokens,
            num_hit_tokens=totals.num_hit_tokens,
            num_role_changes=totals.num_role_changes,
            role=self.spec.role,
            becoming=self.becoming,
            num_launched_tokens=sum([batch.num_prompt_tokens for batch in self._steps.values()]),
        )

    def _on_abort(self, message: Abort) -> None:
        self._abort(message.key, message.choice)
