"""How much KV memory each instance gets, and whether the machine can hold what was asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError

PROCESS_BYTES = 400 * 2**20
"""Memory an instance takes beside weights and KV: interpreter, torch, activations. Measured: 330-420 MiB."""

RANK_BYTES = 250 * 2**20
"""Memory that each further rank of an instance takes beside weights and KV, and its share in the process that starts
them. Measured: 150-230 MiB, as they have their code in common."""

_DEFAULT_KV_BYTES = 256 * 2**20
"""KV per instance that is not exceeded unless asked for, or unless one full-length sequence needs it."""

_DEFAULT_SEQUENCES = 64
"""Full-length sequences that an instance's KV is made for unless asked otherwise."""

_KV_SHARE = 0.5
"""Share of the free memory that all instances' KV may take together by default."""


@dataclass(frozen=True, slots=True)
class KvRequest:
    """What the user said about KV memory of each instance: ``num_tokens``, or ``num_bytes``, or neither."""

    num_tokens: int | None = None
    num_bytes: int | None = None
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class Room:
    """What instances find on a node: ``num_instances`` with ``num_ranks`` ranks may take ``free`` bytes together.

    ``share`` is how much of each is there on average: 1, unless some have ranks on other nodes too. ``name`` says which
    node it is, for messages; empty: this machine.
    """

    num_instances: int
    num_ranks: int
    free: int
    name: str = ""
    share: float = 1.0


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process and its children may still take: what the machine has, or what its control ``group`` leaves.

    Files that the group has read count as used there and give way to whoever needs the memory.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    cached = int(parts.get("active_file", 0)) + int(parts.get("inactive_file", 0))
    return free if limit == "max" else max(0, min(free, int(limit) - used + cached))


def check_processes(num_instances: int, num_ranks: int, free: int) -> None:
    """Raise ConfigError if not even the bare processes of the instances' ``num_ranks`` fit into ``free`` bytes."""
    needed = _process_bytes(num_instances, num_ranks)
    if needed > free:
        ranks = "" if num_ranks == num_instances else f" of {num_ranks} ranks"
        raise ConfigError(
            f"{num_instances} instances{ranks} need more than {_mib(needed)} before weights, {_mib(free)} are free: "
            "ask for fewer"
        )


def _process_bytes(num_instances: int, num_ranks: int) -> int:
    return num_instances * PROCESS_BYTES + (num_ranks - num_instances) * RANK_BYTES


def default_kv_bytes(token_bytes: int, max_model_len: int, block_size: int) -> int:
    """KV memory that an instance on CPUs is given unless asked otherwise, where there is room for it.

    ``token_bytes`` is the KV memory of one token, ``max_model_len`` the tokens of the longest sequence.
    """
    sequence = KvConfig.holding(max_model_len, block_size).num_tokens * token_bytes
    return max(min(_DEFAULT_SEQUENCES * sequence, _DEFAULT_KV_BYTES), sequence)


def size_kv(
    request: KvRequest,
    *,
    weight_bytes: int,
    token_bytes: int,
    max_model_len: int,
    num_instances: int,
    num_ranks: int,
    free: int,
    share: float = 1.0,
) -> KvConfig:
    """KV memory of each of ``num_instances`` equal instances on a host with ``free`` bytes.

    Args:
        request: What the user asked for.
        weight_bytes: Memory of one instance's weights.
        token_bytes: KV memory of one token.
        max_model_len: Longest sequence, in tokens.
        num_instances: Instances on the host.
        num_ranks: Their ranks together, each a process.
        free: Bytes that they may take together.
        share: How much of each is on the host.

    Raises:
        ConfigError: the instances do not fit into memory, or the KV asked for holds no block.
    """
    block_bytes = token_bytes * request.block_size
    processes = _process_bytes(num_instances, num_ranks)
    if request.num_tokens is not None:
        kv_bytes = KvConfig.holding(request.num_tokens, request.block_size).num_blocks * block_bytes
    elif request.num_bytes is not None:
        kv_bytes = request.num_bytes
    else:
        left = free - processes - num_instances * share * weight_bytes
        wanted = default_kv_bytes(token_bytes, max_model_len, request.block_size)
        least = KvConfig.holding(max_model_len, request.block_size).num_blocks * block_bytes
        kv_bytes = min(wanted, max(int(left * _KV_SHARE / (num_instances * share)), least))
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{_mib(kv_bytes)} of KV memory hold not a single block of {request.block_size} tokens "
            f"({_mib(block_bytes)}): give kv_tokens of at least {max_model_len}"
        )
    weights, cache = int(share * weight_bytes), int(share * num_blocks * block_bytes)
    each = weights + cache
    needed = processes + num_instances * each
    if needed > free:
        fit = max(0, free // (each + processes // num_instances))
        process = "its process" if num_ranks == num_instances else "its processes"
        who = "1 instance needs" if num_instances == 1 else f"{num_instances} instances need"
        raise ConfigError(
            f"{who} {_mib(needed)}, {_mib(free)} are free: each takes {_mib(weights)} of "
            f"weights, {_mib(cache)} of KV ({num_blocks * request.block_size} tokens) and "
            f"{_mib(processes // num_instances)} for {process}. {_advice(num_instances, fit)}"
        )
    return KvConfig(num_blocks=num_blocks, block_size=request.block_size)


def least_kv(
    rooms: Iterable[Room], request: KvRequest, *, weight_bytes: int, token_bytes: int, max_model_len: int
) -> KvConfig:
    """KV memory of each of equal instances on several nodes: what the node with the least for each of them allows.

    Arguments as of :func:`size_kv`. Raises ConfigError where instances do not fit; says on which node.
    """
    found = []
    for room in rooms:
        try:
            kv = size_kv(
                request,
                weight_bytes=weight_bytes,
                token_bytes=token_bytes,
                max_model_len=max_model_len,
                num_instances=room.num_instances,
                num_ranks=room.num_ranks,
                free=room.free,
                share=room.share,
            )
        except ConfigError as error:
            raise ConfigError(f"{room.name}: {error}" if room.name else str(error)) from error
        found.append(kv)
    return min(found, key=lambda kv: kv.num_blocks)


def _advice(num_instances: int, fit: int) -> str:
    less = "less KV by kv_tokens."
    if num_instances == 1:
        return f"Ask for {less}"
    return f"{f'{fit} would fit; ask' if fit else 'Ask'} for fewer instances, or {less}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
