"""The prefill instance's scheduler: prompts first come, first served; KV handed to a decode instance.

A batch takes whole prompts in order up to ``max_batch_tokens`` (``L_m``: beyond it prefill is compute-bound,
and a larger batch only delays its first prompts). Only a prompt longer than that is split, into chunks of the
full budget; its last, smaller chunk shares its batch with the prompts behind it. A prompt's blocks are all
taken when it starts, so a started prompt never waits for memory. When the first in line does not fit, nobody
overtakes it.

With prefix caching a prompt starts behind the blocks it has in common with others. Those that a step in flight is
still computing are not offered as ready.
"""

from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from distserve.core.config import InstanceSpec
from distserve.core.handoff import MAX_FAILED_PULLS, PULL_PAUSE, Handoff, HandoffState
from distserve.core.messages import (
    Abort,
    Accepted,
    DecodeAssigned,
    DecodeDropped,
    DecodeWanted,
    Failed,
    HandedOver,
    InstanceGone,
    Leased,
    Message,
    Offer,
    Prefill,
    Prefilled,
    Pulled,
    Refused,
    Renew,
    RequestKey,
    Withdrawn,
)
from distserve.core.request import Request, TokenLogprobs
from distserve.core.scheduler import ROUTER, Batch, InstanceScheduler
from distserve.core.sequence import Sequence


class PrefillScheduler(InstanceScheduler):
    """Computes prompts, samples first tokens, and keeps KV until it is pulled."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__(spec)
        self._waiting: deque[Sequence] = deque()
        self._num_waiting_tokens = 0
        self._sequences: dict[RequestKey, Sequence] = {}
        self._handoffs: dict[RequestKey, Handoff] = {}

    def horizon(self) -> int:
        """Steps over which no batch can change: none, every step ends some prompt's chunk."""
        return 0

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message) -> None:
        match message:
            case Prefill(request):
                self._on_prefill(request)
            case DecodeAssigned(key, decode_id):
                self._on_decode_assigned(key, decode_id)
            case Accepted(key) | Renew(key):
                self._on_lease_wanted(key, sender)
            case Refused(key):
                self._on_refused(key, sender)
            case Pulled(key):
                self._on_pulled(key, sender)
            case Abort():
                self._on_abort(message)
            case InstanceGone(instance_id):
                self._gone.add(instance_id)
                for key, handoff in list(self._handoffs.items()):
                    # A router that is lost takes unanswered questions with it.
                    unanswered = instance_id == ROUTER and handoff.state is HandoffState.WANTED
                    if (handoff.decode_id == instance_id and not handoff.is_pulled) or unanswered:
                        self._want_again(key, handoff, refused_by=None)
            case _:
                self._on_stray(sender, message)

    def _on_prefill(self, request: Request) -> None:
        self._seen.append(request.key)
        if self.spec.kv.blocks_for(request.num_prefill_tokens) > self.blocks.num_blocks:
            reason = (
                f"{request.num_prefill_tokens} tokens exceed this instance's {self.spec.kv.num_tokens} tokens of KV"
            )
            self._send(request.owner_id, Failed(request.key, reason, status=400))
            return
        seq = self._prompt_of(request)
        self._sequences[request.key] = seq
        self._waiting.append(seq)
        self._num_waiting_tokens += seq.num_tokens - seq.num_expected

    # -- batches -------------------------------------------------------------------------------------------------------

    def _form_batch(self) -> Batch | None:
        budget, block_size = self._config.max_batch_tokens, self.spec.kv.block_size
        entries: list[tuple[Sequence, int, bool]] = []
        labelled: list[int] = []
        for seq in self._waiting:
            if budget == 0 or len(entries) == self._config.max_batch_size:
                break
            if seq.num_in_flight > 0:
                continue  # its next chunk needs this one; those behind it may fill the pipeline
            shared = [] if seq.is_open else self._find_prefix(seq)
            remaining = seq.num_tokens - seq.num_computed - len(shared) * block_size
            # A prompt of at most one budget is never split; it waits for a batch that takes it whole.
            if not seq.is_open and budget < remaining <= self._config.max_batch_tokens:
                break
            if not seq.is_open:
                num_used_by_others = len(shared) - self.blocks.num_idle(shared)
                if self.spec.kv.blocks_for(seq.num_tokens) - num_used_by_others > self.blocks.num_free:
                    break
                self._take_blocks(seq, shared)
                self._num_waiting_tokens -= seq.num_computed - seq.num_expected
                seq.marks = (("prefill_start", self._now),)
                self._open(seq, tuple(seq.request.output_token_ids))
            count = min(remaining, budget)
            budget -= count
            is_last = count == remaining
            entries.append((seq, count, is_last))
            if self._config.prefix_caching:
                self._label(seq, seq.num_computed + count, labelled)
        if not entries:
            return None
        for seq, count, is_last in entries:
            self._num_waiting_tokens -= count
            if is_last:
                self._waiting.remove(seq)
        chunks = tuple([seq.chunk(count, samples=is_last) for seq, count, is_last in entries])
        return Batch(entries, chunks, [], self._config.max_batch_tokens - budget, labelled)

    def _on_launched(self, step_id: int, batch: Batch) -> None:
        """Ask for decode instances now: the round trips hide behind the prompts' last chunks."""
        pending = {block for step in self._steps.values() for block in step.labelled}
        for seq, count, is_last in batch.entries:
            if is_last and seq.num_remaining_output > 1:
                key = seq.request.key
                num_ready = seq.num_computed - count
                if pending:
                    known = seq.blocks[: num_ready // self.spec.kv.block_size]
                    num_ready = len(list(takewhile(lambda block: block not in pending, known)))
                    num_ready *= self.spec.kv.block_size
                self._handoffs[key] = Handoff(seq, step_id, num_ready_tokens=num_ready)
                self._want(key, self._handoffs[key])

    def _on_token(self, seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        request = seq.request
        handoff = self._handoffs.get(request.key)
        seq.num_output += 1
        seq.marks = (*seq.marks, ("prefill_end", self._now))
        prompt_logprobs = tuple(seq.prompt_logprobs) if request.sampling.prompt_logprobs is not None else None
        finished = []
        for choice, token_id, logprob in zip(seq.choices, tokens, logprobs, strict=True):
            if self._emit(seq, choice, token_id, logprob, prompt_logprobs):
                finished.append(choice)
            prompt_logprobs = None
        if len(finished) == len(seq.choices):
            self._close(seq)
        else:
            assert handoff is not None, "a prompt that goes on was handed to no one"
            handoff.first_tokens, handoff.finished = tokens, tuple(finished)
            handoff.num_ready_tokens = seq.num_computed
            if handoff.decode_id is not None:
                self._send(handoff.decode_id, Prefilled(request.key, tokens, handoff.finished))
            if handoff.is_pulled:
                self._hand_over(request.key, handoff)

    # -- hand-off ------------------------------------------------------------------------------------------------------

    def _want(self, key: RequestKey, handoff: Handoff) -> None:
        seq = handoff.seq
        request, num_choices = seq.request, len(seq.choices)
        self._send(
            ROUTER,
            DecodeWanted(
                key, request.owner_id, seq.num_tokens, num_choices, request.max_total_tokens, handoff.refused_by
            ),
        )

    def _want_again(self, key: RequestKey, handoff: Handoff, refused_by: str | None, pause: float = 0.0) -> None:
        handoff.reset(refused_by)
        if pause > 0:
            self._expire_after(handoff, pause)
        else:
            self._want(key, handoff)

    def _on_decode_assigned(self, key: RequestKey, decode_id: str) -> None:
        handoff = self._handoffs.get(key)
        if handoff is None or handoff.state is not HandoffState.WANTED:
            self._send(ROUTER, DecodeDropped(key, decode_id))
            return
        handoff.state = HandoffState.OFFERED
        handoff.decode_id = decode_id
        self._expire_after(handoff, self._config.lease)
        seq = handoff.seq
        offer = Offer(seq.request, tuple(seq.blocks), seq.num_tokens, handoff.num_ready_tokens, handoff.last_step)
        self._send(decode_id, offer)
        if handoff.first_tokens is not None:
            self._send(decode_id, Prefilled(key, handoff.first_tokens, handoff.finished))

    def _expire_after(self, handoff: Handoff, seconds: float) -> None:
        handoff.expires = self._now + seconds
        self._wake_by(handoff.expires)

    def _on_lease_wanted(self, key: RequestKey, sender: str) -> None:
        handoff = self._handoffs.get(key)
        if handoff is None or handoff.decode_id != sender:
            self._send(sender, Withdrawn(key))
            return
        handoff.state = HandoffState.LEASED
        self._expire_after(handoff, self._config.lease)
        self._send(sender, Leased(key, self._config.lease))

    def _on_refused(self, key: RequestKey, sender: str) -> None:
        handoff = self._handoffs.get(key)
        if handoff is None or handoff.decode_id != sender or handoff.is_pulled:
            return
        has_failed = handoff.state is HandoffState.LEASED
        handoff.num_failed_pulls += has_failed
        if handoff.num_failed_pulls > MAX_FAILED_PULLS:
            self._fail(handoff.seq, f"{sender} could not pull the KV cache")
        else:
            pause = PULL_PAUSE * (handoff.num_failed_pulls - 1) if has_failed else 0.0
            self._want_again(key, handoff, refused_by=sender, pause=pause)

    def _on_pulled(self, key: RequestKey, sender: str) -> None:
        handoff = self._handoffs.get(key)
        if handoff is None or handoff.decode_id != sender:
            return
        handoff.is_pulled = True
        # The pull may end before this instance has heard of its own step's end: then Prefilled is still to be sent.
        if handoff.first_tokens is not None:
            self._hand_over(key, handoff)

    def _hand_over(self, key: RequestKey, handoff: Handoff) -> None:
        assert handoff.decode_id is not None
        self._send(handoff.seq.request.owner_id, HandedOver(key, handoff.decode_id))
        del self._handoffs[key]
        self._close(handoff.seq)

    def _on_deadline(self) -> None:
        for key, handoff in list(self._handoffs.items()):
            if handoff.expires > self._now or handoff.is_pulled:
                continue
            if handoff.state is HandoffState.WANTED:
                handoff.expires = float("inf")
                self._want(key, handoff)
            else:
                self._fail(handoff.seq, f"{handoff.decode_id} did not pull the KV cache in time")
        expiries = [handoff.expires for handoff in self._handoffs.values() if not handoff.is_pulled]
        self._wake_by(min(expiries, default=float("inf")))

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _live(self) -> list[Sequence]:
        return list(self._sequences.values())

    def _find(self, key: RequestKey, choice: int | None) -> Iterable[Sequence]:
        """A prompt stands for all its choices: a single one cannot be aborted here, its later tokens will be."""
        seq = self._sequences.get(key)
        if seq is None or (choice is not None and seq.choices != (choice,)):
            return ()
        return (seq,)

    def _forget(self, seq: Sequence) -> None:
        key = seq.request.key
        del self._sequences[key]
        if seq.num_computed < seq.num_tokens:
            self._waiting.remove(seq)
            self._num_waiting_tokens -= seq.num_tokens - (seq.num_computed if seq.is_open else seq.num_expected)
        handoff = self._handoffs.pop(key, None)
        if handoff is None:
            return
        if handoff.decode_id is not None:
            self._send(handoff.decode_id, Withdrawn(key))
        if handoff.state is not HandoffState.LEASED:
            # No report may ever name the offer, if it was lost: the router would count its memory for good.
            self._send(ROUTER, DecodeDropped(key, handoff.decode_id))

    def _load(self) -> tuple[int, int, int]:
        return len(self._waiting), self._num_waiting_tokens, len(self._sequences) - len(self._waiting)
