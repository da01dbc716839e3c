"""What a machine wants done. A driver executes commands in the order given and feeds completions back as events.

Commands carry everything a driver needs; a driver decides nothing.
"""

from distserve.core.messages import Message, RequestKey
from distserve.core.records import record
from distserve.core.request import FinishReason, Request, TokenOutput


@record(frozen=True, slots=True)
class Send:
    """Deliver ``message`` to the part named ``to``; never blocks, never waits for an answer."""

    to: str
    message: Message


@record(frozen=True, slots=True)
class WakeAt:
    """Feed a Timer event at ``time`` (seconds). Several may be pending; a machine bears spurious ones."""

    time: float


@record(frozen=True, slots=True)
class OpenSequence:
    """Introduce a sequence to the engine before its first chunk.

    The engine knows it as ``seq_id`` (unique on the instance, never reused) until :class:`CloseSequence`.
    ``output_token_ids`` counts as output (penalties, random counter position); tokens ``[0, num_computed_tokens)`` of
    prompt + output already have KV in the blocks that the first step's table update names. ``choices`` lists the
    choices sampled from each of its logits rows: several only for a prompt with n > 1, whose sequence ends with its
    first tokens.
    """

    seq_id: int
    request: Request
    choices: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    num_computed_tokens: int


@record(frozen=True, slots=True)
class CloseSequence:
    """The engine forgets the sequence; no later step names it. Its blocks are the scheduler's business."""

    seq_id: int


@record(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` further tokens of a sequence.

    ``samples`` if they reach its last known token and logits are wanted.
    """

    seq_id: int
    num_tokens: int
    samples: bool


@record(frozen=True, slots=True)
class TableUpdate:
    """Entries of a sequence's block table from position ``start`` on become ``blocks``."""

    seq_id: int
    start: int
    blocks: tuple[int, ...]


@record(frozen=True, slots=True)
class RunStep:
    """Run one batch.

    Block ``copies`` (source, destination) come first, then ``tables``, then the forward over ``chunks``. An unchanged
    decode batch is the identical ``chunks`` tuple from step to step, which an engine may use as a fast path.
    """

    step_id: int
    chunks: tuple[Chunk, ...]
    tables: tuple[TableUpdate, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()


@record(frozen=True, slots=True)
class Migrate:
    """Pull KV: ``src_blocks[i]`` of instance ``source_id`` into local ``dst_blocks[i]``, all layers.

    The first ``num_ready_blocks`` are complete now; the others once the source's step ``ready_step`` has passed each
    layer. Ends with exactly one Migrated event, also when cancelled.
    """

    pull_id: int
    key: RequestKey
    source_id: str
    src_blocks: tuple[int, ...]
    dst_blocks: tuple[int, ...]
    num_ready_blocks: int
    ready_step: int
    deadline: float


@record(frozen=True, slots=True)
class CancelMigrate:
    """Give up a pull; its Migrated event (ok or not) still comes, and only then may its blocks be freed."""

    pull_id: int


@record(frozen=True, slots=True)
class Deliver:
    """Owner side: tokens for the client of ``request_id``, in order, without gaps or repeats."""

    request_id: str
    outputs: tuple[TokenOutput, ...]


@record(frozen=True, slots=True)
class Conclude:
    """Owner side: nothing more will be delivered. ``status`` is 200, or an HTTP error code with ``reason``."""

    request_id: str
    status: int = 200
    reason: str = ""
    retry_after: float = 0.0
    finish: FinishReason | None = None


Command = Send | WakeAt | OpenSequence | CloseSequence | RunStep | Migrate | CancelMigrate | Deliver | Conclude
