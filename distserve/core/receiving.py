"""What decode and mixed schedulers share about KV that was computed elsewhere: offers, pulls, and who goes on here.

Memory is promised on offer or refused, with ``headroom`` kept free for growth. With prefix caching an offer's blocks
that are here already, by their keys, are neither reserved twice nor pulled; what was pulled can be found once the
source has said that it computed it (its first token).

The records of offers and their states are :mod:`distserve.core.intake`'s.
"""

from collections.abc import Iterable

from distserve.core.commands import CancelMigrate, Migrate
from distserve.core.config import InstanceSpec
from distserve.core.decoding import DecodingScheduler
from distserve.core.events import Migrated
from distserve.core.intake import Intake
from distserve.core.messages import (
    Abort,
    Accepted,
    Failed,
    InstanceGone,
    Leased,
    Message,
    Offer,
    Prefilled,
    Pulled,
    Refused,
    Renew,
    RequestKey,
    Withdrawn,
)
from distserve.core.prefix import BlockKey, extend_keys
from distserve.core.request import Request
from distserve.core.sequence import Sequence


class ReceivingScheduler(DecodingScheduler):
    """An instance scheduler that takes KV in; what runs of it is in ``_by_key``."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__(spec)
        self._by_key: dict[RequestKey, list[Sequence]] = {}
        self._intakes: dict[RequestKey, Intake] = {}
        self._pulls: dict[int, RequestKey] = {}
        self._dropped: dict[int, Intake] = {}
        """Given up while their pulls run: their blocks are freed when the transport says it has ended."""

    def _is_settled(self) -> bool:
        return not any(intake.is_complete for intake in self._intakes.values())

    # -- the role's part -----------------------------------------------------------------------------------------------

    def _num_starting(self) -> int:
        """Choices that have memory here and do not run yet, intakes aside."""
        return 0

    def _ahead(self, request: Request) -> tuple[int, int]:  # noqa: ARG002 -- the hook's
        """(blocks, choices) of those who wait here and are older than ``request``: they come first."""
        return 0, 0

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message) -> None:
        match message:
            case Offer():
                self._on_offer(sender, message)
            case Leased(key, term):
                self._on_leased(key, term)
            case Prefilled(key, first_tokens, finished):
                self._on_prefilled(key, first_tokens, finished)
            case Withdrawn(key):
                self._abort(key, None)
                self._drop_intake(key)
            case Abort(key, choice):
                self._on_abort(message)
                if choice is None or self._is_only_choice(key, choice):
                    self._drop_intake(key)
            case InstanceGone(instance_id):
                self._on_instance_gone(instance_id)
            case _:
                self._on_stray(sender, message)

    def _on_offer(self, sender: str, offer: Offer) -> None:
        request = offer.request
        key = request.key
        self._seen.append(key)
        if sender in self._gone:
            return  # nobody would ever lease what is offered, nor withdraw it
        if key in self._intakes or key in self._by_key:
            return  # a repeated offer: the first one counts
        kv = self.spec.kv
        total = kv.blocks_to_admit(offer.num_tokens, len(request.choices))
        if not kv.can_ever_hold(offer.num_tokens, request.max_total_tokens, len(request.choices)):
            reason = f"{request.max_total_tokens} tokens exceed this instance's {kv.num_tokens} tokens of KV"
            self._send(request.owner_id, Failed(key, reason, status=400))
            self._send(sender, Refused(key))
            return
        keys: list[BlockKey] = []
        if self._config.prefix_caching:
            num_full = offer.num_tokens // kv.block_size
            extend_keys(keys, request, request.output_token_ids, num_full, kv.block_size, request.choices[0])
        held = self.blocks.find(keys)
        # What is held and idle is taken from what is free, like any other block.
        needed = total - (len(held) - self.blocks.num_idle(held))
        blocks_ahead, choices_ahead = self._ahead(request)
        num_promised = self._num_promised() + choices_ahead
        is_idle = not self._running and num_promised == 0
        headroom = 0 if is_idle else int(self._config.headroom * kv.num_blocks)
        has_slot = len(self._running) + num_promised + len(request.choices) <= self._config.max_batch_size
        has_room = blocks_ahead + needed + headroom <= self.blocks.num_free and (has_slot or is_idle)
        if not has_room or self._writes_free_blocks():
            self._send(sender, Refused(key))
            return
        self.blocks.claim(held)
        self._intakes[key] = Intake(
            request=request,
            source_id=sender,
            num_tokens=offer.num_tokens,
            src_blocks=tuple(offer.blocks),
            num_ready_tokens=offer.num_ready_tokens,
            ready_step=offer.ready_step,
            blocks=held + self.blocks.allocate(total - len(held)),
            pending_at=self._now,
            num_held=len(held),
            keys=keys,
        )
        self._send(sender, Accepted(key))

    def _writes_free_blocks(self) -> bool:
        """Whether a step in flight writes blocks that its sequence, preempted under lookahead, has given back.

        Later steps write them after it, but a pull would not wait for it.
        """
        if not self._config.lookahead:
            return False
        return any(not seq.blocks for batch in self._steps.values() for seq, _, _ in batch.entries)

    def _on_leased(self, key: RequestKey, term: float) -> None:
        intake = self._intakes.get(key)
        if intake is None or intake.ended_at is not None:
            return
        num_blocks, num_held = len(intake.src_blocks), intake.num_held
        if num_held == num_blocks:
            intake.started_at = self._now
            self._on_kv_there(key, intake)
            return
        intake.asked_at, intake.term = intake.pending_at, term
        self._wake_by(intake.asked_at + term / 2)
        if intake.pull_id is not None:
            return
        self._next_pull_id += 1
        intake.pull_id = self._next_pull_id
        intake.started_at = self._now
        self._pulls[intake.pull_id] = key
        self._commands.append(
            Migrate(
                pull_id=intake.pull_id,
                key=key,
                source_id=intake.source_id,
                src_blocks=intake.src_blocks[num_held:],
                dst_blocks=tuple(intake.blocks[num_held:num_blocks]),
                num_ready_blocks=max(0, intake.num_ready_tokens // self.spec.kv.block_size - num_held),
                ready_step=intake.ready_step,
                deadline=self._now + self._config.pull_timeout,
            )
        )

    def _on_migrated(self, event: Migrated) -> None:
        dropped = self._dropped.pop(event.pull_id, None)
        if dropped is not None:
            self.blocks.release(dropped.blocks)
            return
        key = self._pulls.pop(event.pull_id)
        intake = self._intakes[key]
        if not event.ok or self._now > intake.asked_at + intake.term:
            intake.pull_id = None
            self._drop_intake(key)
            self._send(intake.source_id, Refused(key))
            return
        self.totals.num_pulls += 1
        self.totals.pulled_bytes += event.num_bytes
        self.totals.pull_seconds += self._now - intake.started_at
        self._on_kv_there(key, intake)

    def _on_kv_there(self, key: RequestKey, intake: Intake) -> None:
        intake.ended_at = self._now
        self._send(intake.source_id, Pulled(key))
        self._admit_if_complete(key, intake)

    def _on_prefilled(self, key: RequestKey, first_tokens: tuple[int, ...], finished: tuple[int, ...]) -> None:
        intake = self._intakes.get(key)
        if intake is not None:
            intake.first_tokens, intake.finished = first_tokens, finished
            self._admit_if_complete(key, intake)

    def _admit_if_complete(self, key: RequestKey, intake: Intake) -> None:
        """Turn a complete intake into running sequences: forks share the prompt's blocks."""
        if not intake.is_complete:
            return
        del self._intakes[key]
        assert intake.first_tokens is not None
        assert intake.ended_at is not None
        request = intake.request
        num_blocks = len(intake.src_blocks)
        prompt_blocks, spare = intake.blocks[:num_blocks], intake.blocks[num_blocks:]
        self.blocks.release(spare)
        if self._config.prefix_caching:
            # Not before: with the first token the source says that the step behind these bytes did not fail.
            self.blocks.label(prompt_blocks[: len(intake.keys)], intake.keys)
            self.totals.num_queried_tokens += intake.num_tokens
            self.totals.num_hit_tokens += intake.num_held * self.spec.kv.block_size
        family: list[Sequence] = []
        for choice, token_id in zip(request.choices, intake.first_tokens, strict=True):
            if choice in intake.finished:
                continue
            if family:
                self.blocks.share(prompt_blocks)
            seq = Sequence(
                seq_id=self._new_seq_id(),
                request=request,
                choices=(choice,),
                num_tokens=intake.num_tokens + 1,
                num_output=len(request.output_token_ids) + 1,
                blocks=list(prompt_blocks),
                num_computed=intake.num_tokens,
                keys=list(intake.keys),
                num_labelled=len(intake.keys),
                output_token_ids=[*request.output_token_ids, token_id] if self._keeps_output else [],
                marks=(("migration_start", intake.started_at), ("migration_end", intake.ended_at)),
            )
            self._open(seq, (*request.output_token_ids, token_id))
            self._join(seq)
            family.append(seq)
        assert family, "a prompt whose choices all ended was handed over"
        self._by_key[key] = family

    # -- intakes that end early ----------------------------------------------------------------------------------------

    def _is_only_choice(self, key: RequestKey, choice: int) -> bool:
        intake = self._intakes.get(key)
        return intake is not None and intake.request.choices == (choice,)

    def _drop_intake(self, key: RequestKey) -> None:
        intake = self._intakes.pop(key, None)
        if intake is None:
            return
        if intake.pull_id is not None and intake.ended_at is None:
            # The transport may be writing these blocks: they are free only when it says so.
            del self._pulls[intake.pull_id]
            self._dropped[intake.pull_id] = intake
            self._commands.append(CancelMigrate(intake.pull_id))
        else:
            self.blocks.release(intake.blocks)

    def _on_instance_gone(self, instance_id: str) -> None:
        self._gone.add(instance_id)
        for key, intake in list(self._intakes.items()):
            if intake.source_id == instance_id:
                self._drop_intake(key)
                # Its last words may have been HandedOver to the owner, while Prefilled was lost or is late.
                self._send(intake.request.owner_id, Failed(key, f"{instance_id} was lost"))

    def _on_blocks_lost(self, lost: set[int], reason: str) -> None:
        for seq in self._live():
            if not lost.isdisjoint(seq.blocks):
                self._fail(seq, reason)
        for key, intake in list(self._intakes.items()):
            if lost.isdisjoint(intake.blocks[: intake.num_held]):
                continue
            is_pulled = intake.ended_at is not None
            self._drop_intake(key)
            if is_pulled:
                self._send(intake.request.owner_id, Failed(key, reason))
            else:
                self._send(intake.source_id, Refused(key))

    def _on_deadline(self) -> None:
        """Renew leases of pulls past half their term."""
        for key, intake in self._intakes.items():
            is_pulling = intake.pull_id is not None and intake.ended_at is None
            is_asked = intake.pending_at > intake.asked_at
            if not is_pulling or is_asked:
                continue
            half_term = intake.asked_at + intake.term / 2
            if self._now >= half_term:
                intake.pending_at = self._now
                self._send(intake.source_id, Renew(key))
            else:
                self._wake_by(half_term)

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _mark_first_steps(self, chosen: Iterable[Sequence]) -> None:
        """Note when sequences that were taken in take their first step."""
        for seq in chosen:
            if seq.marks and seq.marks[-1][0] == "migration_end":
                seq.marks = (*seq.marks, ("decode_start", self._now))

    def _live(self) -> list[Sequence]:
        return [seq for family in self._by_key.values() for seq in family]

    def _num_promised(self) -> int:
        """Choices that have a place here and do not run yet."""
        return self._num_starting() + sum(len(intake.request.choices) for intake in self._intakes.values())
