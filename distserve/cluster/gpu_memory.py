"""How the memory of one GPU is divided among the processes that share it. Pure arithmetic: nothing here asks a card.

Every process of a card has its own CUDA context, weights, activations and CUDA graphs; only KV pools are open to the
others. Weights are not shared: two roles on one card hold them twice, which a mixed instance does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.cluster.sizing import KvRequest
from distserve.core.config import KvConfig, Role
from distserve.core.errors import ConfigError

CONTEXT_BYTES = 768 * 2**20
"""What a process takes of a card before it computes anything: context, kernels, libraries' workspaces. An estimate."""
GRAPH_BYTES = 256 * 2**20
"""What captured decode steps take beside their activations, on instances that decode. An estimate."""
SPARE_SHARE = 0.02
"""Share of a card's memory left to nobody: allocators round up, and drivers keep some."""
_PREFILL_SHARE = 0.25
"""Share of the KV memory that prefill gets at most, unless one prompt of full length needs more."""
_PREFILL_PROMPTS, _PREFILL_BATCHES = 2, 4
"""Prompts of full length, and batches, that a prefill instance's KV is made for: being computed, queued and leased."""


@dataclass(frozen=True, slots=True)
class CardMemory:
    """One GPU: ``index`` as the driver counts, its type, all of its memory and what of it is free, in bytes."""

    index: int
    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What a model takes of a card in one data type; all in bytes.

    ``weights`` of the whole model, ``token_kv`` of one token over all layers, ``token_activations`` of one token in a
    step while it is computed, ``row_logits`` of one row of logits, ``row_sampling`` of drawing a token from it.
    """

    dtype: str
    weights: int
    token_kv: int
    token_activations: int
    row_logits: int
    row_sampling: int

    def halved(self) -> "ModelMemory":
        """The same model in a data type of half the bytes; sampling is in float32 in any case."""
        return replace(
            self,
            dtype="bfloat16",
            weights=self.weights // 2,
            token_kv=self.token_kv // 2,
            token_activations=self.token_activations // 2,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may be: the engine's limits, as of :class:`distserve.core.config.SchedulerConfig`."""

    max_batch_tokens: int
    max_batch_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process's part of a card, in bytes but for ``kv``."""

    role: Role
    weights: int
    context: int
    activations: int
    graphs: int
    kv: KvConfig
    kv_bytes: int

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.fixed + self.kv_bytes

    @property
    def fixed(self) -> int:
        """All but KV."""
        return self.weights + self.context + self.activations + self.graphs


@dataclass(frozen=True, slots=True)
class _Needs:
    """What must be there whatever else: per process, in the order of the roles."""

    fixed: tuple[ProcessMemory, ...]
    least_kv: int

    @property
    def num_bytes(self) -> int:
        return sum(process.fixed + self.least_kv for process in self.fixed)


def activation_bytes(role: Role, model: ModelMemory, limits: Limits) -> int:
    """Most that a step of ``role`` needs beside weights and KV.

    A step has at most ``max_batch_tokens`` of prompts, and a row of logits for each whose log-probability is asked for;
    an instance that decodes has a token per sequence as well. Every instance draws a token per sequence at most.
    """
    prompts = limits.max_batch_tokens if role is not Role.DECODE else 0
    decodes = limits.max_batch_size if role is not Role.PREFILL else 0
    rows = (prompts + decodes) * (model.token_activations + model.row_logits)
    return rows + limits.max_batch_size * model.row_sampling


def split_card(
    card: CardMemory, roles: Sequence[Role], model: ModelMemory, limits: Limits, request: KvRequest
) -> tuple[ProcessMemory, ...]:
    """Memory of each process that is to share ``card``, in the order of ``roles``.

    As much KV as ``request`` says, if it says anything. Else prefill instances get enough for their queue and leases,
    at most a quarter of what there is unless a prompt of full length needs more, and the others share the rest: no more
    than a full batch of full-length sequences can fill. Where there are only prefill instances, they share all of it.

    Raises:
        ConfigError: it does not fit; says how much is missing, and what would help.
    """
    assert roles
    needs = _needs(roles, model, limits, request)
    usable = _usable(card)
    if needs.num_bytes > usable:
        raise ConfigError(_explain(card, roles, model, limits, request, needs))
    block_bytes = model.token_kv * request.block_size
    wanted = _asked(request, block_bytes)
    left = (usable - sum(process.fixed for process in needs.fixed)) // block_bytes
    least = needs.least_kv // block_bytes
    num_prefill = sum(role is Role.PREFILL for role in roles)
    num_others = len(roles) - num_prefill
    if wanted is not None:
        prefill = others = wanted
    else:
        full = limits.max_batch_size * least
        prefill = _prefill_blocks(limits, request, left, num_prefill, num_others, least) if num_prefill else 0
        others = min((left - num_prefill * prefill) // num_others, full) if num_others else 0
    kv = {role: KvConfig(prefill if role is Role.PREFILL else others, request.block_size) for role in roles}
    return tuple(
        replace(process, kv=kv[process.role], kv_bytes=kv[process.role].num_blocks * block_bytes)
        for process in needs.fixed
    )


def own_card_kv(request: KvRequest, token_kv: int) -> KvConfig:
    """KV memory of an instance with a card of its own, which ``request`` has to name; ``token_kv`` as of ModelMemory.

    The instance itself says whether there is room. Raises ConfigError if not even a block was asked for.
    """
    num_blocks = _asked(request, token_kv * request.block_size)
    assert num_blocks is not None, "checked before anything starts"
    return KvConfig(num_blocks, request.block_size)


def _usable(card: CardMemory) -> int:
    return max(0, card.free - int(card.total * SPARE_SHARE))


def _needs(roles: Sequence[Role], model: ModelMemory, limits: Limits, request: KvRequest) -> _Needs:
    """What the processes take at least: with one full-length sequence each, or with what was asked for."""
    block_bytes = model.token_kv * request.block_size
    asked = _asked(request, block_bytes)
    # Room for one more token than the longest sequence has: see KvConfig.blocks_to_admit.
    least = KvConfig(0, request.block_size).blocks_to_admit(limits.max_model_len, 1) if asked is None else asked
    fixed = tuple(
        ProcessMemory(
            role,
            weights=model.weights,
            context=CONTEXT_BYTES,
            activations=activation_bytes(role, model, limits),
            graphs=0 if role is Role.PREFILL else GRAPH_BYTES,
            kv=KvConfig(least, request.block_size),
            kv_bytes=least * block_bytes,
        )
        for role in roles
    )
    return _Needs(fixed, least * block_bytes)


def _asked(request: KvRequest, block_bytes: int) -> int | None:
    """Blocks that the user asked for; None if they left it to us. Raises ConfigError if that is less than one."""
    if request.num_tokens is not None:
        return -(-request.num_tokens // request.block_size)
    if request.num_bytes is None:
        return None
    if request.num_bytes < block_bytes:
        raise ConfigError(
            f"{request.num_bytes} bytes of KV hold not a single block of {request.block_size} tokens ({block_bytes} "
            "bytes): give more --kv-memory"
        )
    return request.num_bytes // block_bytes


def _prefill_blocks(
    limits: Limits, request: KvRequest, left: int, num_prefill: int, num_others: int, least: int
) -> int:
    """Blocks of each prefill instance, of ``left`` for all; every instance has ``least``, for which there is room."""
    tokens = _PREFILL_PROMPTS * limits.max_model_len + _PREFILL_BATCHES * limits.max_batch_tokens
    enough = max(-(-tokens // request.block_size), least)
    if not num_others:
        return min(left // num_prefill, limits.max_batch_size * least)
    share = max(int(left * _PREFILL_SHARE) // num_prefill, least)
    return min(enough, share, (left - num_others * least) // num_prefill)


def _explain(
    card: CardMemory, roles: Sequence[Role], model: ModelMemory, limits: Limits, request: KvRequest, needs: _Needs
) -> str:
    usable = _usable(card)
    missing = needs.num_bytes - usable
    names = " and ".join(str(role) for role in roles)
    process = max(needs.fixed, key=lambda each: each.fixed)
    kv = "the KV asked for" if _is_said(request) else f"KV for one sequence of {limits.max_model_len} tokens"
    return (
        f"GPU {card.index} ({card.name}) has no room for {names}: they need {_gib(needs.num_bytes)}, "
        f"{_gib(usable)} of {_gib(card.total)} can be had; {missing} bytes ({_gib(missing)}) are missing. Each of "
        f"{len(roles)} processes takes {_gib(process.weights)} of weights, which are not shared between processes, "
        f"{_gib(needs.least_kv)} for {kv}, and up to {_gib(process.fixed - process.weights)} for its CUDA context, "
        f"activations and graphs. {_advice(usable, roles, model, limits, request)}"
    )


def _advice(usable: int, roles: Sequence[Role], model: ModelMemory, limits: Limits, request: KvRequest) -> str:
    """What alone would make it fit."""
    fits: list[str] = []
    if model.dtype == "float32" and _needs(roles, model.halved(), limits, request).num_bytes <= usable:
        fits.append("weights and KV of half the size (--dtype bfloat16)")
    if len(roles) > 1 and _needs([Role.MIXED], model, limits, request).num_bytes <= usable:
        fits.append("one mixed instance, which holds the weights once (--mixed 1)")
    unsaid = replace(request, num_tokens=None, num_bytes=None)
    if _is_said(request) and _needs(roles, model, limits, unsaid).num_bytes <= usable:
        fits.append("no --kv-tokens or --kv-memory, so that KV takes what is left")
    if not _is_said(request) and (shorter := _longest(usable, roles, model, limits, request)):
        fits.append(f"shorter sequences (--max-model-len {shorter})")
    if fits:
        return f"What would do: {'; or '.join(fits)}."
    return (
        "None of --dtype, --max-model-len, --kv-tokens and --mixed 1 alone would do: use a larger card or a smaller "
        "model."
    )


def _longest(usable: int, roles: Sequence[Role], model: ModelMemory, limits: Limits, request: KvRequest) -> int:
    """The longest sequence, in tokens, for which there is room; 0 if there is none of a block's length."""
    left = usable - sum(process.fixed for process in _needs(roles, model, limits, request).fixed)
    num_blocks = left // (len(roles) * model.token_kv * request.block_size)
    return max(0, num_blocks * request.block_size - 1)


def _is_said(request: KvRequest) -> bool:
    return request.num_tokens is not None or request.num_bytes is not None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
