"""The decode instance's scheduler: takes KV in, then one token per sequence and step.

Memory is promised on offer or refused, with ``headroom`` kept free for growth. When a running sequence needs
a block and none is free, the youngest (latest arrival) is preempted: its owner resubmits it with the tokens
it has, so no state of it stays here.

With prefix caching the KV of a sequence that ends stays until its memory is needed, and an offer's blocks that are
here already, by their keys, are neither reserved twice nor pulled. What was pulled can be found once the source has
said that it computed it (its first token), what was decoded once the steps that did have ended.

With ``lookahead`` a step is launched before the tokens of the step before it are known; the token a finished
sequence samples too many is discarded. With ``max_in_flight`` > 1 and no lookahead (pipeline stages) the
running sequences are spread evenly over the batches in flight.
"""

from collections.abc import Iterable

from distserve.core.commands import Chunk
from distserve.core.config import InstanceSpec
from distserve.core.messages import Preempted, RequestKey
from distserve.core.receiving import ReceivingScheduler
from distserve.core.request import TokenLogprobs
from distserve.core.scheduler import Batch
from distserve.core.sequence import Sequence


class DecodeScheduler(ReceivingScheduler):
    """Continuous batching over sequences whose KV was pulled from prefill instances."""

    def __init__(self, spec: InstanceSpec) -> None:
        super().__init__(spec)
        self._chunks: dict[tuple[int, ...], tuple[Chunk, ...]] = {}

    # -- batches -------------------------------------------------------------------------------------------------------

    def _form_batch(self) -> Batch | None:
        copies: list[tuple[int, int]] = []
        chosen = self._choose_running(self._config.max_batch_size, copies)
        if not chosen:
            return None
        seq_ids = tuple([seq.seq_id for seq in chosen])
        chunks = self._chunks.get(seq_ids)
        if chunks is None:
            # An unchanged batch is the identical tuple: a sign to engines that nothing but positions moved.
            chunks = tuple([seq.chunk(1, samples=True) for seq in chosen])
            if len(self._chunks) >= 2 * self._config.max_in_flight:
                self._chunks.clear()
            self._chunks[seq_ids] = chunks
        self._mark_first_steps(chosen)
        return Batch([(seq, 1, True) for seq in chosen], chunks, copies, len(chosen))

    def _preempt(self, victim: Sequence) -> None:
        self._send(victim.request.owner_id, Preempted(victim.request.key, victim.choice))
        self._give_up(victim)

    def _on_token(self, seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        seq.num_tokens += 1
        seq.num_output += 1
        if self._keeps_output:
            seq.output_token_ids.append(tokens[0])
        if self._emit(seq, seq.choice, tokens[0], logprobs[0]):
            self._give_up(seq)

    def _give_up(self, seq: Sequence) -> None:
        """It ends here; its KV may be wanted again, by the next turn of a conversation or by itself."""
        if self._config.prefix_caching:
            self._label_done(seq)
        self._close(seq)

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _find(self, key: RequestKey, choice: int | None) -> Iterable[Sequence]:
        return [seq for seq in self._by_key.get(key, ()) if choice is None or seq.choice == choice]

    def _forget(self, seq: Sequence) -> None:
        self._leave(seq)
        family = self._by_key[seq.request.key]
        family.remove(seq)
        if not family:
            del self._by_key[seq.request.key]

    def _load(self) -> tuple[int, int, int]:
        return len(self._intakes) + len(self._dropped), 0, len(self._running)
