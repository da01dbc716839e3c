"""A request's state on one instance."""

from distserve.core.commands import Chunk
from distserve.core.prefix import BlockKey, extend_keys
from distserve.core.request import FinishReason, Request, TokenLogprobs


class Sequence:
    """One line of tokens with one block table, on one instance.

    On a prefill instance it stands for all choices of a request, elsewhere for one. ``num_tokens`` counts known
    tokens (prompt and output), ``num_computed`` those whose KV is in ``blocks`` once all steps in flight are done, so
    it includes what they compute. ``num_output`` counts output tokens across attempts, ``max_output`` those allowed.
    ``output_token_ids`` are kept only where it may be recomputed without its owner, or its KV be found later. ``keys``
    say what its full blocks hold, from the first on, as far as somebody wanted to know; see :meth:`extend_keys`.
    ``num_labelled`` entries of ``blocks`` are those whose content the block manager was told, or that it found.

    Invariant: ``num_computed <= num_tokens`` except under lookahead, where the token a step in flight will sample may
    be computed by the step after it.
    """

    # No dataclass, whose constructor stays interpreted where the module is compiled: ten times as long.
    def __init__(
        self,
        seq_id: int,
        request: Request,
        choices: tuple[int, ...],
        num_tokens: int,
        num_output: int,
        *,
        output_token_ids: list[int] | None = None,
        blocks: list[int] | None = None,
        num_computed: int = 0,
        keys: list[BlockKey] | None = None,
        num_labelled: int = 0,
        num_cached: int = 0,
        marks: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.choices = choices
        self.num_tokens = num_tokens
        self.num_output = num_output
        self.max_output: int = request.sampling.max_tokens
        self.output_token_ids: list[int] = [] if output_token_ids is None else output_token_ids
        self.blocks: list[int] = [] if blocks is None else blocks
        self.num_computed = num_computed
        self.keys: list[BlockKey] = [] if keys is None else keys
        self.num_labelled = num_labelled
        self.marks = marks
        self.num_in_flight = 0
        self.is_open = False
        """The engine knows the sequence."""
        self.is_closed = False
        """Finished, aborted or preempted: results still in flight are discarded."""
        self.num_published = 0
        """Entries of ``blocks`` that the engine's block table has."""
        self.num_expected = 0
        """Tokens of a prompt that waits whose KV was there when it came; it need not be any more when it starts."""
        self.num_cached = num_cached
        """Tokens of its prompt whose KV was there when it started first."""
        self.is_recomputed = False
        """It was preempted and starts again."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._step: Chunk | None = None

    def chunk(self, num_tokens: int, *, samples: bool) -> Chunk:
        """Its part in a batch; that of a decode step is made once."""
        step = self._step
        if num_tokens == 1 and samples and step is not None and step.seq_id == self.seq_id:
            return step
        chunk = Chunk(self.seq_id, num_tokens, samples)
        if num_tokens == 1 and samples:
            self._step = chunk
        return chunk

    def extend_keys(self, num_blocks: int, block_size: int) -> None:
        """Have keys for the first ``num_blocks`` blocks, all of whose tokens are known."""
        extend_keys(self.keys, self.request, self.output_token_ids, num_blocks, block_size, self.choices[0])

    @property
    def choice(self) -> int:
        """The one choice this sequence generates."""
        assert len(self.choices) == 1
        return self.choices[0]

    @property
    def num_remaining_output(self) -> int:
        """Output tokens still allowed."""
        return self.max_output - self.num_output

    def finish_reason(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Why the sequence ends with ``token_id`` as its ``num_output``-th output token.

        And the stop token if one ended it.

        ``num_output`` already counts the token. End tokens do not count before ``min_tokens``.
        """
        sampling = self.request.sampling
        if self.num_output >= sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
            if not sampling.ignore_eos and token_id in sampling.eos_token_ids:
                return FinishReason.STOP, None
        if self.num_output >= self.max_output:
            return FinishReason.LENGTH, None
        return None, None
