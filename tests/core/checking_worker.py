"""An engine that computes nothing: it keeps the books a real one keeps, and answers with a step's shape and tokens.

It asserts what a scheduler must never do: name a sequence the engine does not know, compute past the known tokens,
write a token into a block its table lacks. So every simulated run checks the scheduler too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.commands import CloseSequence, OpenSequence, RunStep
from distserve.core.events import StepDone
from distserve.core.latency import StepShape
from distserve.core.request import Request

TokenSource = Callable[[Request, int, int], int]
"""(request, choice, output index) -> token id; the same whatever instance computes it."""


@dataclass(slots=True)
class _Line:
    request: Request
    choices: tuple[int, ...]
    num_output: int
    num_tokens: int
    num_computed: int
    table: list[int] = field(default_factory=list)


class CheckingWorker:
    """Stands where :class:`distserve.engine.worker.Worker` stands."""

    def __init__(self, block_size: int, tokens: TokenSource) -> None:
        self._block_size = block_size
        self._tokens = tokens
        self._lines: dict[int, _Line] = {}

    @property
    def num_open(self) -> int:
        """Sequences opened and not closed."""
        return len(self._lines)

    def open(self, command: OpenSequence) -> None:
        """Introduce a sequence."""
        assert command.seq_id not in self._lines, "sequence opened twice"
        num_output = len(command.output_token_ids)
        self._lines[command.seq_id] = _Line(
            request=command.request,
            choices=command.choices,
            num_output=num_output,
            num_tokens=len(command.request.prompt_token_ids) + num_output,
            num_computed=command.num_computed_tokens,
        )

    def close(self, command: CloseSequence) -> None:
        """Forget a sequence."""
        del self._lines[command.seq_id]

    def die(self) -> None:
        """Whatever is open ends here."""
        self._lines.clear()

    def run(self, step: RunStep) -> tuple[StepShape, StepDone]:
        """Account for one step: its shape, and the completion to be fed back when its time has passed."""
        for update in step.tables:
            self._lines[update.seq_id].table[update.start :] = update.blocks
        prefill_tokens = pairs = decodes = context = prefills = 0
        tokens: list[int] = []
        written: set[int] = set()
        for chunk in step.chunks:
            line = self._lines[chunk.seq_id]
            start, end = line.num_computed, line.num_computed + chunk.num_tokens
            assert end <= line.num_tokens, "computes tokens that are not known"
            assert chunk.samples == (end == line.num_tokens), "samples exactly at the last known token"
            blocks = line.table[start // self._block_size : -(-end // self._block_size)]
            assert len(blocks) == -(-end // self._block_size) - start // self._block_size, "no block for a token"
            assert not written.intersection(blocks), "two sequences write one block"
            written.update(blocks)
            line.num_computed = end
            if chunk.num_tokens == 1 and line.num_output > 0:
                decodes += 1
                context += end
            else:
                prefills += 1
                prefill_tokens += chunk.num_tokens
                pairs += chunk.num_tokens * (start + end + 1) // 2
            if chunk.samples:
                tokens += [self._tokens(line.request, choice, line.num_output) for choice in line.choices]
                line.num_output += 1
                line.num_tokens += 1
        shape = StepShape(prefill_tokens, pairs, decodes, context, prefills)
        return shape, StepDone(step.step_id, tuple(tokens))
