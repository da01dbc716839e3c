"""Static facts about instances and their schedulers, fixed at start and never mutated.

Checked user input becomes these frozen dataclasses at the edge (``distserve.cluster.config``); nothing in here reads
files.
"""

from dataclasses import dataclass
from enum import StrEnum

from distserve.core.errors import ConfigError


class Role(StrEnum):
    """What an instance does with requests."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class PrefillPolicy(StrEnum):
    """How a mixed instance composes prompts with decoding, see :mod:`distserve.core.mixed`."""

    SPLITFUSE = "splitfuse"
    WHOLE_PROMPT = "whole"


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Ranks of one instance: ``tp`` tensor-parallel shards in each of ``pp`` pipeline stages."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        """GPUs (or processes) the instance occupies."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class SLO:
    """Service-level objective: ``attainment`` of offered requests have TTFT and TPOT (seconds) within bounds."""

    ttft: float
    tpot: float
    attainment: float = 0.9


@dataclass(frozen=True, slots=True)
class KvConfig:
    """Paged KV memory of one instance: ``num_blocks`` blocks of ``block_size`` tokens each."""

    num_blocks: int
    block_size: int = 16

    @classmethod
    def holding(cls, num_tokens: int, block_size: int) -> "KvConfig":
        """The fewest blocks that hold ``num_tokens`` tokens."""
        return cls(-(-num_tokens // block_size), block_size)

    @property
    def num_tokens(self) -> int:
        """KV capacity in tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_to_admit(self, num_tokens: int, num_choices: int) -> int:
        """Blocks with which ``num_choices`` choices of a prompt of ``num_tokens`` tokens can take their first step.

        One token of growth; every choice but the first needs its own copy of a partly filled last block.
        """
        return self.blocks_for(num_tokens + 1) + num_choices - 1

    def can_ever_hold(self, num_tokens: int, max_total_tokens: int, num_choices: int) -> bool:
        """Whether a prompt of ``num_tokens`` fits that ``num_choices`` continue, up to ``max_total_tokens`` each.

        All choices must be able to start; at the end one has to fit, for the others can be preempted.
        """
        return max(self.blocks_for(max_total_tokens), self.blocks_to_admit(num_tokens, num_choices)) <= self.num_blocks


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How one rank's KV memory is laid out: ``[L, 2, N, P, K, D]`` of ``dtype``, keys before values, C-contiguous.

    So a layer is one contiguous span, and within it a block's keys (and values) are one of ``P * K * D`` elements.
    Two ranks whose layouts differ in anything but ``num_blocks`` cannot exchange blocks as they are.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """``(L, 2, N, P, K, D)``."""
        return (self.num_layers, 2, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys (or values) in one layer."""
        item = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.block_size * self.num_kv_heads * self.head_dim * item

    @property
    def token_bytes(self) -> int:
        """Bytes of KV one token takes over all layers."""
        return 2 * self.num_layers * self.block_bytes // self.block_size

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool."""
        return 2 * self.num_layers * self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits one instance schedules within.

    ``max_batch_tokens`` is DistServe's ``L_m`` on a prefill instance (where prefill becomes compute-bound) and
    FastGen's token budget on a mixed one. ``max_in_flight`` batches may be under way at once (pipeline stages, or
    lookahead). ``lookahead`` lets a decode step start before the tokens of the step before it are known. ``headroom``
    is the share of KV blocks a decode side keeps free when it admits, so that growth rarely preempts. ``lease`` is
    how many seconds prefill blocks stay valid for a pull without renewal, ``pull_timeout`` after how many a pull
    counts as hung. A Report is sent at most every ``report_interval`` seconds while load changes and at least every
    ``heartbeat`` seconds. With ``prefix_caching`` a prompt (or a preempted sequence) shares the KV blocks of an
    earlier one that began with the same tokens, if they are still there, and is computed from there on; of KV that
    nobody uses at most ``prefix_cache_tokens`` tokens are kept for that (None: as long as memory lasts). ``policy``
    counts on mixed instances only.
    """

    max_batch_tokens: int = 512
    max_batch_size: int = 64
    max_in_flight: int = 1
    lookahead: bool = False
    headroom: float = 0.05
    lease: float = 10.0
    pull_timeout: float = 120.0
    report_interval: float = 0.1
    heartbeat: float = 3.0
    max_model_len: int = 2048
    prefix_caching: bool = False
    prefix_cache_tokens: int | None = None
    policy: PrefillPolicy = PrefillPolicy.SPLITFUSE


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One model replica: its identity, role, shape and memory."""

    instance_id: str
    role: Role
    kv: KvConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()

    def check_prefix_cache(self) -> None:
        """Raise ConfigError if more KV is to be kept for later prompts than there is memory, or less than a block."""
        tokens = self.scheduler.prefix_cache_tokens
        if tokens is None:
            return
        if not self.kv.block_size <= tokens <= self.kv.num_tokens:
            raise ConfigError(
                f"a prefix cache of {tokens} tokens does not fit {self.instance_id}: its KV memory holds "
                f"{self.kv.num_tokens} tokens, in blocks of {self.kv.block_size}"
            )
