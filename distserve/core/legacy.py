"""What an instance's scheduler leaves to its successor in another role: the memory, and how far it has counted."""

from dataclasses import dataclass

from distserve.core.block_manager import BlockManager


@dataclass(frozen=True, slots=True)
class Legacy:
    """The state that outlives a role. Nothing is computed, pulled or held any more.

    ``blocks`` are all free, and still known by what they hold. Steps, sequences and pulls are numbered on from
    ``next_*``, as engine and transport want. ``gone`` are instances lost: an offer of theirs may still be on its way.
    The other figures are totals since the instance started.
    """

    blocks: BlockManager
    next_step_id: int
    next_seq_id: int
    next_pull_id: int
    gone: frozenset[str]
    num_role_changes: int
    num_preempted: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_pulls: int
    pulled_bytes: int
    pull_seconds: float
