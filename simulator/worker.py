"""An engine that computes nothing: it keeps the few counts from which a step's shape follows.

Its lines advance lazily: as long as the batch is the very same tuple of chunks, one tick stands for a step of each.
"""

from dataclasses import dataclass
from typing import Protocol

from distserve.core.commands import Chunk, CloseSequence, OpenSequence, RunStep
from distserve.core.events import Event, UnseenStepDone
from distserve.core.latency import StepShape


class Worker(Protocol):
    """What the loop needs of an engine."""

    def open(self, command: OpenSequence) -> None:
        """Introduce a sequence."""

    def close(self, command: CloseSequence) -> None:
        """Forget a sequence."""

    def run(self, step: RunStep) -> tuple[StepShape, Event]:
        """Account for one step: its shape, and the event that says it is done when its time has passed."""
        ...

    def die(self) -> None:
        """Whatever is open ends here."""


@dataclass(slots=True, eq=False)
class _Line:
    request_id: str
    num_output: int
    num_computed: int


class SimulatedWorker:
    """Stands where :class:`distserve.engine.worker.Worker` stands; its steps' tokens are not looked at.

    ``progress`` is told, for every sequence that leaves, how many output tokens its request has come to.
    """

    def __init__(self, progress: dict[str, int]) -> None:
        self._lines: dict[int, _Line] = {}
        self._chunks: tuple[Chunk, ...] = ()
        self._batch: list[_Line] = []
        """The lines of a batch of decodes alone, ``_num_ticks`` behind."""
        self._num_ticks = 0
        self._shape = StepShape()
        self._progress = progress

    def open(self, command: OpenSequence) -> None:
        """Introduce a sequence."""
        num_output = len(command.output_token_ids)
        self._lines[command.seq_id] = _Line(command.request.request_id, num_output, command.num_computed_tokens)

    def close(self, command: CloseSequence) -> None:
        """Forget a sequence."""
        if self._num_ticks:
            self._catch_up()
        line = self._lines.pop(command.seq_id)
        self._progress[line.request_id] = line.num_output

    def die(self) -> None:
        """Whatever is open ends here."""
        for seq_id in list(self._lines):
            self.close(CloseSequence(seq_id))

    def skip(self, num_steps: int) -> None:
        """The last step's like happened ``num_steps`` more times."""
        self._num_ticks += num_steps

    def run(self, step: RunStep) -> tuple[StepShape, Event]:
        """Account for one step."""
        chunks = step.chunks
        if chunks is self._chunks:
            self._num_ticks += 1
            shape = self._shape
            context = shape.decode_context + shape.num_decodes * self._num_ticks
            longest = shape.longest_context + self._num_ticks
            return StepShape(0, 0, shape.num_decodes, context, 0, longest), UnseenStepDone(step.step_id)
        self._catch_up()
        lines = self._lines
        prefill_tokens = pairs = decodes = context = prefills = longest = 0
        batch = []
        for chunk in chunks:
            line = lines[chunk.seq_id]
            count = chunk.num_tokens
            start = line.num_computed
            line.num_computed = end = start + count
            if count == 1 and line.num_output:
                decodes += 1
                context += end
                longest = max(longest, end)
            else:
                prefills += 1
                prefill_tokens += count
                pairs += count * (start + end + 1) // 2
            if chunk.samples:
                line.num_output += 1
            batch.append(line)
        shape = StepShape(prefill_tokens, pairs, decodes, context, prefills, longest)
        if not prefills:
            self._chunks, self._batch, self._shape = chunks, batch, shape
        return shape, UnseenStepDone(step.step_id)

    def _catch_up(self) -> None:
        ticks = self._num_ticks
        if ticks:
            for line in self._batch:
                line.num_computed += ticks
                line.num_output += ticks
            self._num_ticks = 0
        self._chunks, self._batch = (), []
