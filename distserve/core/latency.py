"""How long a step takes: the interface, and the evaluation of a fitted profile.

The simulator times steps with it. How a profile is measured or fitted is no
concern of this module.
"""

from typing import Protocol

from distserve.core.records import record


@record(frozen=True, slots=True)
class StepShape:
    """What a step computes, as far as its time depends on it.

    ``num_prefill_tokens`` query tokens belong to the chunks of ``num_prefills`` prompts, ``prefill_pairs`` is the
    number of (query, key) pairs their attention evaluates; ``num_decodes`` sequences take one token each over
    ``decode_context`` cached tokens in all, the new ones included, of which the longest sequence has
    ``longest_context`` (0: not known, then they are taken as equal).
    """

    num_prefill_tokens: int = 0
    prefill_pairs: int = 0
    num_decodes: int = 0
    decode_context: int = 0
    num_prefills: int = 0
    longest_context: int = 0


class StepTime(Protocol):
    """Predicts the times of one instance's steps.

    An instance has ``pp`` equal pipeline stages: a step occupies each for :meth:`seconds` in turn, and its activations
    take :meth:`handover` from one stage to the next, during which neither stage is busy. Without pipelining the step
    takes :meth:`seconds`.
    """

    def seconds(self, shape: StepShape) -> float:
        """Seconds the step occupies one pipeline stage, the collectives of its shards included."""
        ...

    def handover(self, shape: StepShape) -> float:
        """Seconds from a stage's end to the start of the next one.

        Below zero where stages are unequal and :meth:`seconds` is what the busiest takes: the others end sooner.
        """
        ...


@record(frozen=True, slots=True)
class LinearStepTime:
    """Affine in a step's work, the form of DistServe's fits.

    seconds = ``base`` + ``per_token`` * tokens + ``per_pair`` * prefill pairs + ``per_context`` * decode context.
    """

    base: float
    per_token: float
    per_pair: float
    per_context: float

    def seconds(self, shape: StepShape) -> float:
        """See :class:`StepTime`."""
        return (
            self.base
            + self.per_token * (shape.num_prefill_tokens + shape.num_decodes)
            + self.per_pair * shape.prefill_pairs
            + self.per_context * shape.decode_context
        )

    def handover(self, shape: StepShape) -> float:  # noqa: ARG002 -- the interface's
        """None: the fit is of one stage."""
        return 0.0
