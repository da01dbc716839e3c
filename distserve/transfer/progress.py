"""How far a source's current step is: two 64-bit words that the source writes and its peers poll.

``generation`` is a random number while the source serves and 0 once it has closed. ``progress`` packs
``step_id << 16 | layers``, where ``layers`` counts the layers of that step whose KV is complete (``0xFFFF`` at its
end), so that one word says all and only ever grows.

Memory order: the step's KV stores precede the progress store in the program order of the thread that runs the step
(worker threads have joined it), and the reader loads the word before it loads KV. x86-64 keeps stores in order among
themselves and loads likewise, and an aligned 8-byte access is one instruction, so nothing else is needed; a kernel
that writes KV with streaming stores must fence before it returns.
"""

import secrets

NUM_BYTES = 16
_GENERATION, _PROGRESS = 0, 1
_LAYERS_BITS = 16
_LAYERS_MASK = (1 << _LAYERS_BITS) - 1


class SourceProgress:
    """The two words; ``memory`` is at least 16 bytes, 8-byte aligned, writable only at the source."""

    __slots__ = ("_words",)

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("B")[:NUM_BYTES].cast("Q")

    @property
    def generation(self) -> int:
        """Which life of a source this memory belongs to; 0 once it has closed."""
        return self._words[_GENERATION]

    def open(self) -> None:
        """Start serving under a new generation."""
        self._words[_PROGRESS] = 0
        self._words[_GENERATION] = secrets.randbits(63) | 1

    def retire(self) -> None:
        """Tell readers that nothing they read from now on may be used."""
        self._words[_GENERATION] = 0

    def begin_step(self, step_id: int) -> None:
        """No layer of ``step_id`` is complete, every earlier step is."""
        self._words[_PROGRESS] = step_id << _LAYERS_BITS

    def layer_done(self, step_id: int, layer: int) -> None:
        """Layers up to and with ``layer`` of ``step_id`` are complete."""
        self._words[_PROGRESS] = step_id << _LAYERS_BITS | (layer + 1)

    def end_step(self, step_id: int) -> None:
        """All of ``step_id`` is complete."""
        self._words[_PROGRESS] = step_id << _LAYERS_BITS | _LAYERS_MASK

    def layers_passed(self, step_id: int, num_layers: int) -> int:
        """How many of the first ``num_layers`` layers have their KV of step ``step_id`` complete."""
        word = self._words[_PROGRESS]
        step, layers = word >> _LAYERS_BITS, word & _LAYERS_MASK
        if step != step_id:
            return num_layers if step > step_id else 0
        return min(layers, num_layers)
