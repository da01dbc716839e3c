"""The mixed instance's scheduler: prefill and decode in one place, by Dynamic SplitFuse or whole prompts.

Dynamic SplitFuse (DeepSpeed-FastGen): every step takes at most ``max_batch_tokens`` tokens (the budget).
Running sequences come first, one token each; then waiting prompts in order, the last one cut so that the
budget is filled exactly, its rest first in line for the next step. So at most one prompt is split per step
and only a prompt's last chunk yields a token.

Whole prompts (vLLM before chunked prefill): a step is either whole prompts up to the budget (a longer one
alone), which go before any decoding, or one token for every running sequence.

A prompt's blocks are all taken when it starts, so two half-done prompts cannot block each other. When a
running sequence needs a block and none is free, the youngest sequence is evicted; it waits in order of
arrival and is recomputed here, from the first of its blocks that somebody else has had meanwhile.

With prefix caching a prompt starts behind the blocks it has in common with others, running or not; they do not
count as memory it needs while somebody uses them.

Where there are prefill instances as well, sequences whose prompts were computed there come by their KV
(:mod:`distserve.core.receiving`) and run beside those that started here. Who is older has memory first, wherever its
prompt is computed; one that is evicted is recomputed here, whoever computed it before.
"""

from bisect import insort
from collections.abc import Iterable
from itertools import takewhile

from distserve.core.commands import CloseSequence
from distserve.core.config import InstanceSpec, PrefillPolicy
from distserve.core.decoding import age
from distserve.core.messages import Failed, Message, Prefill, RequestKey
from distserve.core.receiving import ReceivingScheduler
from distserve.core.request import Request, TokenLogprobs
from distserve.core.scheduler import Batch
from distserve.core.sequence import Sequence


class MixedScheduler(ReceivingScheduler):
    """Serves whole requests on one instance, and goes on with those whose prompts were computed elsewhere."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__(spec)
        self._keeps_output = True
        self._waiting: list[Sequence] = []
        """Prompts not wholly launched yet, oldest first; those already started precede the others."""

    def _is_settled(self) -> bool:
        return not self._waiting and super()._is_settled()

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message) -> None:
        match message:
            case Prefill(request):
                self._on_request(request)
            case _:
                super()._on_message(sender, message)

    def _on_request(self, request: Request) -> None:
        self._seen.append(request.key)
        kv = self.spec.kv
        if not kv.can_ever_hold(request.num_prefill_tokens, request.max_total_tokens, len(request.choices)):
            reason = (
                f"{request.max_total_tokens} tokens for {len(request.choices)} choices exceed this instance's "
                f"{kv.num_tokens} tokens of KV"
            )
            self._send(request.owner_id, Failed(request.key, reason, status=400))
            return
        seq = self._prompt_of(request)
        self._by_key[request.key] = [seq]
        self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        """In order of arrival, but never before a prompt that has started."""
        insort(self._waiting, seq, key=lambda waiting: (not waiting.is_open, age(waiting)))

    def _num_starting(self) -> int:
        return sum(len(waiting.choices) for waiting in takewhile(lambda other: other.is_open, self._waiting))

    def _ahead(self, request: Request) -> tuple[int, int]:
        kv, arrival = self.spec.kv, request.arrival
        older = [seq for seq in self._waiting if not seq.is_open and seq.request.arrival <= arrival]
        num_blocks = sum(kv.blocks_to_admit(seq.num_tokens, len(seq.choices)) for seq in older)
        return num_blocks, sum(len(seq.choices) for seq in older)

    # -- batches -------------------------------------------------------------------------------------------------------

    def _form_batch(self) -> Batch | None:
        config = self._config
        copies: list[tuple[int, int]] = []
        labelled: list[int] = []
        if config.policy is PrefillPolicy.WHOLE_PROMPT:
            entries = self._whole_prompts(labelled) or self._decodes(config.max_batch_size, copies)
        else:
            entries = self._decodes(config.max_batch_tokens, copies)
            entries += self._prompt_chunks(config.max_batch_tokens - len(entries), labelled)
        if not entries:
            return None
        chunks = tuple([seq.chunk(count, samples=samples) for seq, count, samples in entries])
        return Batch(entries, chunks, copies, sum(count for _, count, _ in entries), labelled)

    def _decodes(self, limit: int, copies: list[tuple[int, int]]) -> list[tuple[Sequence, int, bool]]:
        chosen = self._choose_running(limit, copies)
        self._mark_first_steps(chosen)
        return [(seq, 1, True) for seq in chosen]

    def _prompt_chunks(self, budget: int, labelled: list[int]) -> list[tuple[Sequence, int, bool]]:
        chosen: list[tuple[Sequence, int, bool]] = []
        for seq in self._waiting:
            if budget == 0:
                break
            if seq.is_open and seq.num_in_flight > 0 and not self._config.lookahead:
                continue
            if not self._start(seq):
                break
            count = min(budget, seq.num_tokens - seq.num_computed)
            budget -= count
            chosen.append((seq, count, seq.num_computed + count == seq.num_tokens))
            if self._config.prefix_caching:
                self._label(seq, seq.num_computed + count, labelled)
        self._move_launched(chosen)
        return chosen

    def _whole_prompts(self, labelled: list[int]) -> list[tuple[Sequence, int, bool]]:
        block_size = self.spec.kv.block_size
        budget = self._config.max_batch_tokens
        chosen: list[tuple[Sequence, int, bool]] = []
        for seq in self._waiting:
            if chosen and seq.num_tokens - len(self._find_prefix(seq)) * block_size > budget:
                break
            if not self._start(seq):
                break
            count = seq.num_tokens - seq.num_computed
            budget -= count
            chosen.append((seq, count, True))
            if self._config.prefix_caching:
                self._label(seq, seq.num_tokens, labelled)
        self._move_launched(chosen)
        return chosen

    def _move_launched(self, chosen: list[tuple[Sequence, int, bool]]) -> None:
        for seq, _, is_last in chosen:
            if is_last:
                self._waiting.remove(seq)
                self._join(seq)

    def _start(self, seq: Sequence) -> bool:
        """Take all blocks of a prompt that has not started; False: no room, and nobody may overtake it.

        Nor may anybody overtake a preempted sequence whose last token is still being sampled.
        """
        if seq.is_open:
            return True
        if seq.num_in_flight > 0:
            return False
        kv, config = self.spec.kv, self._config
        num_promised = self._num_promised()
        is_idle = not self._running and num_promised == 0
        headroom = 0 if is_idle else int(config.headroom * kv.num_blocks)
        shared = self._find_prefix(seq)
        # What is found and idle is taken from what is free, like any other block.
        num_used_by_others = len(shared) - self.blocks.num_idle(shared)
        needed = kv.blocks_to_admit(seq.num_tokens, len(seq.choices)) - num_used_by_others
        has_slot = len(self._running) + num_promised + len(seq.choices) <= config.max_batch_size
        if needed + headroom > self.blocks.num_free or not (has_slot or is_idle):
            return False
        self._take_blocks(seq, shared)
        seq.marks = (*seq.marks, ("prefill_start", self._now)) if seq.num_output == 0 else seq.marks
        self._open(seq, tuple(seq.output_token_ids))
        return True

    def _youngest(self) -> Sequence:
        """The last arrival that holds blocks, whether past its prompt or not."""
        started = takewhile(lambda seq: seq.is_open, self._waiting)
        return max([self._running[-1], *started], key=age)

    def _may_preempt(self, victim: Sequence) -> bool:
        """See the base class.

        Under lookahead an engine runs its steps in order: whoever has the blocks next writes them after the victim's
        steps in flight. The token those sample still counts, unless it comes with what a recomputation would repeat.
        """
        is_plain = len(victim.choices) == 1 and victim.request.sampling.prompt_logprobs is None
        return victim.num_in_flight == 0 or (self._config.lookahead and is_plain)

    def _preempt(self, victim: Sequence) -> None:
        """Give its blocks back and queue it to be recomputed from its tokens, or from the first block that is lost."""
        self._commands.append(CloseSequence(victim.seq_id))
        if victim in self._waiting:
            self._waiting.remove(victim)
        else:
            self._leave(victim)
        victim.seq_id = self._new_seq_id()
        self._label_all(victim)
        self.blocks.release(victim.blocks)
        victim.blocks, victim.num_published, victim.num_computed, victim.is_open = [], 0, 0, False
        victim.is_recomputed = True
        # A recomputed prompt's log-probabilities would be reported twice.
        victim.prompt_logprobs.clear()
        self._enqueue(victim)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _on_token(self, seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        is_first = seq.num_output == 0
        if is_first:
            seq.marks = (*seq.marks, ("prefill_end", self._now))
        family = [seq] if len(seq.choices) == 1 else self._fork(seq)
        wanted = seq.request.sampling.prompt_logprobs is not None
        prompt_logprobs = tuple(seq.prompt_logprobs) if is_first and wanted else None
        for member, token_id, logprob in zip(family, tokens, logprobs, strict=True):
            member.num_tokens += 1
            member.num_output += 1
            member.output_token_ids.append(token_id)
            has_ended = self._emit(member, member.choice, token_id, logprob, prompt_logprobs)
            prompt_logprobs = None
            if has_ended:
                if self._config.prefix_caching:
                    self._label_all(member)
                self._close(member)
            elif member is not seq:
                self._open(member, tuple(member.output_token_ids))

    def _fork(self, seq: Sequence) -> list[Sequence]:
        """One sequence per choice, sharing the prompt's blocks; the parent ends."""
        request = seq.request
        family = [
            Sequence(
                seq_id=self._new_seq_id(),
                request=request,
                choices=(choice,),
                num_tokens=seq.num_tokens,
                num_output=seq.num_output,
                blocks=list(seq.blocks),
                num_computed=seq.num_computed,
                keys=list(seq.keys),
                num_labelled=seq.num_labelled,
                num_cached=seq.num_cached,
                marks=seq.marks if choice == seq.choices[0] else (),
            )
            for choice in seq.choices
        ]
        for member in family:
            self.blocks.share(member.blocks)
            self._join(member)
        self._by_key[request.key] += family
        self._close(seq)
        return family

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _find(self, key: RequestKey, choice: int | None) -> Iterable[Sequence]:
        return [seq for seq in self._by_key.get(key, ()) if choice is None or seq.choices == (choice,)]

    def _forget(self, seq: Sequence) -> None:
        if seq in self._waiting:
            self._waiting.remove(seq)
        else:
            self._leave(seq)
        family = self._by_key[seq.request.key]
        family.remove(seq)
        if not family:
            del self._by_key[seq.request.key]

    def _load(self) -> tuple[int, int, int]:
        tokens = sum(seq.num_tokens - (seq.num_computed or seq.num_expected) for seq in self._waiting)
        return len(self._waiting) + len(self._intakes) + len(self._dropped), tokens, len(self._running)
