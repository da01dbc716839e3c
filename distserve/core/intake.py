"""The receiving side of a KV hand-off: one record per offer that a decode instance accepted.

::

    Offer       blocks found or reserved, Accepted sent (or Refused, and no record)
    Leased      the pull starts, from now on Renew every half term; if nothing is missing: Pulled sent
    Migrated    ok: Pulled sent, the instance is in charge; not ok: Refused sent, blocks freed
    Prefilled   first tokens known

Decoding starts when both KV and first tokens are there. The lease's term counts from the *sending* of
Accepted or Renew, which is before the prefill side starts counting, so a pull that ends within it read blocks
that were still held, whatever the messages' delays, without a further round trip.
"""

from dataclasses import dataclass, field

from distserve.core.prefix import BlockKey
from distserve.core.request import Request


@dataclass(slots=True)
class Intake:
    """A reservation: ``blocks`` receive the KV of ``num_tokens`` tokens.

    The blocks beyond those are for the first growth. The first ``num_held`` were here before, found by ``keys``, which
    say what the full ones are to hold; the source's counterparts of those are not pulled.
    """

    request: Request
    source_id: str
    num_tokens: int
    src_blocks: tuple[int, ...]
    num_ready_tokens: int
    ready_step: int
    blocks: list[int]
    pending_at: float
    """When the lease was last asked for (Accepted or Renew)."""
    num_held: int = 0
    keys: list[BlockKey] = field(default_factory=list)
    asked_at: float = 0.0
    """When the lease in force was asked for: it holds until ``asked_at + term``."""
    term: float = 0.0
    pull_id: int | None = None
    started_at: float = 0.0
    ended_at: float | None = None
    first_tokens: tuple[int, ...] | None = None
    finished: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """KV and first tokens are both there."""
        return self.ended_at is not None and self.first_tokens is not None
