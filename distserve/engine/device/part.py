"""What is different for a runner whose model is one rank's part, and for its graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distserve.engine.inputs import StepInputs


class Stage(Protocol):
    """A pipeline stage's part of a model: see :class:`distserve.engine.sharding.stage.StageModel`."""

    @property
    def is_first(self) -> bool:
        """Whether it begins with tokens, and receives nothing."""
        ...

    @property
    def is_last(self) -> bool:
        """Whether it ends with logits."""
        ...

    def entering_buffer(self, num_tokens: int) -> Tensor:
        """Memory for what the stage before makes of ``num_tokens`` tokens, on the device."""
        ...

    def receive(self, num_tokens: int) -> Tensor:
        """What the stage before made of the step's tokens, [T, hidden]."""
        ...

    def compute(self, inputs: StepInputs, entering: Tensor | None, on_layer: Callable[[int], None] | None) -> Tensor:
        """The stage's own work: [T, hidden] to the next stage's, or logits [R, vocabulary]."""
        ...

    def hand_on(self, output: Tensor) -> Tensor | None:
        """Send to the next stage; the last one's logits are returned."""
        ...

    def all_agree(self, is_so: bool) -> bool:
        """Whether all shards of the stage say so; waits for them."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part in drawing: one rank ``draws``, and all others learn the tokens from it.

    ``share`` makes of its tokens [S] int64, on the device, those of all; others give memory. Without it the host tells
    them (:meth:`distserve.engine.device.runner.DeviceRunner.record`), before a step that needs them.
    """

    draws: bool
    share: Callable[[Tensor], Tensor] | None = None


ALONE = Part(draws=True)
"""A rank that is its whole instance."""
