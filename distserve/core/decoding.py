"""What decode and mixed schedulers share: running sequences that grow by one token a step.

Running sequences are kept oldest first. When one needs a block and none is free, the youngest sequence of all
gives its blocks back; what becomes of it is the role's business.
"""

from abc import abstractmethod
from bisect import insort
from collections.abc import Sequence as SequenceOf

from distserve.core.config import InstanceSpec
from distserve.core.messages import RequestKey
from distserve.core.scheduler import UNSEEN, Batch, InstanceScheduler
from distserve.core.sequence import Sequence


def age(seq: Sequence) -> tuple[float, str, int]:
    """Sort key: oldest arrival first; unique within an instance."""
    return (seq.request.arrival, seq.request.request_id, seq.choices[0])


class DecodingScheduler(InstanceScheduler):
    """An instance scheduler with running sequences."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__(spec)
        self._keeps_output = self._config.prefix_caching
        """Whether a sequence keeps its output: to be recomputed here, or for its blocks to be known by it."""
        self._running: list[Sequence] = []
        self._running_changes = 0
        """Times that a sequence joined or left the running ones."""
        self._changes_at_launch = 0
        self._is_steady = False
        """The step launched last was one token for each running sequence, and none of them its first."""
        self._steady_steps: int | None = None
        """Steps after the one in flight that would have its batch; None until asked for."""
        self._num_skipped = 0
        """Steps of that batch that ended and that its sequences do not know of."""
        self._growth_at: list[int] = []
        """How many sequences need a block with the k-th skipped step, for each k modulo the block size."""
        self._grown: list[int] = []
        """Blocks taken for them."""

    def _join(self, seq: Sequence) -> None:
        insort(self._running, seq, key=age)
        self._running_changes += 1

    def _leave(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._running_changes += 1

    def _on_launched(self, step_id: int, batch: Batch) -> None:  # noqa: ARG002 -- the hook's
        num_running = len(self._running)
        self._is_steady = (
            len(batch.entries) == batch.num_tokens == num_running
            and not batch.copies
            and all(seq.num_output > 0 for seq in self._running)
        )
        self._changes_at_launch = self._running_changes
        self._steady_steps = None

    @abstractmethod
    def _is_settled(self) -> bool:
        """Nothing but running sequences can enter the next batches."""

    def _youngest(self) -> Sequence:
        """The latest arrival that holds blocks and may lose them."""
        return self._running[-1]

    def _may_preempt(self, victim: Sequence) -> bool:
        """Whether its blocks can be another's at once."""
        return victim.num_in_flight == 0

    @abstractmethod
    def _preempt(self, victim: Sequence) -> None:
        """Take the sequence's blocks and remove it from the running ones."""

    def horizon(self) -> int:
        """Steps, the next one included, over which no batch can change: no message and no end token provided.

        0 when nothing runs or something is about to change it: a sequence at its output limit, a prompt that
        waits, or memory that does not last for the growth of all. A lower bound, found by halving.
        """
        if not self._running or not self._is_settled():
            return 0
        self._apply_skips()
        steps = min(seq.num_remaining_output - seq.num_in_flight for seq in self._running)
        while steps > 0:
            if sum(self._growth(seq, steps) for seq in self._running) <= self.blocks.num_free:
                return steps
            steps //= 2
        return 0

    def steady_steps(self) -> int:
        """See the base class; pipelined and lookahead batches are not followed."""
        if len(self._steps) != 1 or self._max_in_flight > 1 or not self._is_settled():
            return 0
        running = self._running
        if not self._is_steady or self._running_changes != self._changes_at_launch:
            return 0
        steps = self._steady_steps
        if steps is None:
            steps = min([seq.num_remaining_output for seq in running]) - 1
            self._steady_steps = steps
        # Cheap where memory is plenty: no sequence grows by more blocks than this.
        if len(running) * (steps // self.spec.kv.block_size + 1) > self.blocks.num_free:
            return min(steps, self.horizon())
        return steps

    def skip(self, ends: SequenceOf[float]) -> None:
        """See the base class. Sequences are told of it when somebody looks at them; memory is taken as it would be.

        No block that is written is shared: every sequence has taken a step of its own.
        """
        assert self._steady_steps is not None, "steps were skipped that nobody asked for"
        num_steps = len(ends)
        self._steady_steps -= num_steps
        (batch,) = self._steps.values()
        self._pace.count_alike(ends[-1] - (ends[-2] if num_steps > 1 else batch.start), ends[-1])
        batch.start = ends[-1]
        if not self._growth_at:
            block_size = self.spec.kv.block_size
            self._growth_at = [0] * block_size
            for seq, _, _ in batch.entries:
                self._growth_at[len(seq.blocks) * block_size - seq.num_computed] += 1
        growth_at = self._growth_at
        num_rounds, num_rest = divmod(num_steps, len(growth_at))
        grown = num_rounds * len(batch.entries)  # in so many steps as a block has slots every sequence needs one
        for step in range(self._num_skipped, self._num_skipped + num_rest):
            grown += growth_at[step % len(growth_at)]
        self._num_skipped += num_steps
        if grown:
            self._grown += self.blocks.allocate(grown)

    def _apply_skips(self) -> None:
        """Tell running sequences of the steps skipped since their batch was launched."""
        num_steps = self._num_skipped
        if num_steps == 0:
            return
        self._num_skipped = 0
        block_size, grown = self.spec.kv.block_size, self._grown
        (batch,) = self._steps.values()
        for seq, _, _ in batch.entries:
            seq.num_tokens += num_steps
            seq.num_output += num_steps
            seq.num_computed = computed = seq.num_computed + num_steps
            if self._keeps_output:
                seq.output_token_ids += [UNSEEN] * num_steps
            missing = -(-computed // block_size) - len(seq.blocks)
            if missing > 0:
                seq.blocks += grown[-missing:]
                seq.num_published = len(seq.blocks)
                del grown[-missing:]
        assert not grown, "memory was taken for nobody"
        self._growth_at = []

    def _abort(self, key: RequestKey, choice: int | None) -> None:
        self._apply_skips()
        super()._abort(key, choice)

    def _end_step(self, step_id: int) -> Batch:
        self._apply_skips()
        self._growth_at = []
        return super()._end_step(step_id)

    def _on_unseen_token(self, seq: Sequence) -> None:
        if seq.marks or seq.num_output == 0 or seq.num_remaining_output <= 1:
            super()._on_unseen_token(seq)
            return
        seq.num_tokens += 1
        seq.num_output += 1
        if self._keeps_output:
            seq.output_token_ids.append(UNSEEN)

    def _growth(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks the sequence's next tokens take, a copy of a shared last block included."""
        blocks = self.spec.kv.blocks_for(seq.num_computed + num_tokens) - len(seq.blocks)
        return max(0, blocks) + self._tail_is_shared(seq)

    def _choose_running(self, limit: int, copies: list[tuple[int, int]]) -> list[Sequence]:
        """The oldest ``limit`` sequences that may take a step now, each with a writable next slot.

        Block copies that must precede the step are appended to ``copies``.
        """
        config = self._config
        if config.max_in_flight > 1 and not config.lookahead:
            limit = min(limit, -(-len(self._running) // config.max_in_flight))
        may_overlap = config.max_in_flight if config.lookahead else 1
        easily = None if config.lookahead else self._choose_with_room(limit)
        if easily is not None:
            return easily
        chosen: list[Sequence] = []
        index = 0
        while index < len(self._running) and len(chosen) < limit:
            seq = self._running[index]
            is_past_prompt = seq.num_computed >= seq.num_tokens - 1 and len(seq.choices) == 1
            # What is left of a sequence that is not in flight is not nothing: it would have ended.
            in_flight = seq.num_in_flight
            may_go_on = in_flight == 0 or (in_flight < may_overlap and seq.num_remaining_output > in_flight)
            if is_past_prompt and may_go_on:
                if not self._make_room(seq, copies):
                    if not seq.blocks:
                        continue  # it was the youngest itself and is gone from the list
                    break  # steps or pulls in flight hold the memory it needs; nobody younger goes before it
                chosen.append(seq)
            index += 1
        return chosen

    def _choose_with_room(self, limit: int) -> list[Sequence] | None:
        """The same choice where nobody needs more than a free block; None where somebody does.

        Memory is given as it would be one by one.
        """
        blocks = self.blocks
        has_shared = blocks.has_shared
        block_size = self.spec.kv.block_size
        chosen: list[Sequence] = []
        growing: list[Sequence] = []
        for seq in self._running:
            computed = seq.num_computed
            if seq.num_in_flight or computed < seq.num_tokens - 1 or len(seq.choices) > 1:
                continue
            if len(chosen) == limit:
                break
            if computed // block_size == len(seq.blocks):
                growing.append(seq)
            elif has_shared and self._tail_is_shared(seq):
                return None
            chosen.append(seq)
        if len(growing) > blocks.num_free:
            return None
        for seq in growing:
            seq.blocks += blocks.allocate(1)
        return chosen

    def _tail_is_shared(self, seq: Sequence) -> bool:
        index = seq.num_computed // self.spec.kv.block_size
        return index < len(seq.blocks) and self.blocks.is_shared(seq.blocks[index])

    def _make_room(self, seq: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Give the sequence a writable slot for its next token, preempting younger ones if it must."""
        index = seq.num_computed // self.spec.kv.block_size
        is_growth = index == len(seq.blocks)
        # Preempting a fork may leave the last block to this sequence alone: then nothing is needed any more.
        while is_growth or self._tail_is_shared(seq):
            if self.blocks.num_free > 0:
                block = self.blocks.allocate(1)[0]
                if is_growth:
                    seq.blocks.append(block)
                else:
                    self.blocks.hold(seq.blocks[index])
                    copies.append((seq.blocks[index], block))
                    self.blocks.release([seq.blocks[index]])
                    seq.blocks[index] = block
                    seq.num_published = min(seq.num_published, index)
                return True
            victim = self._youngest()
            if not self._may_preempt(victim):
                return False
            self.totals.num_preempted += 1
            self._preempt(victim)
            if victim is seq:
                return False
        return True
