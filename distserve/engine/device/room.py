"""Whether a model's weights and KV have room on a device, before they are brought there."""

import torch

from distserve.core.errors import ConfigError

_MIB = 2**20


def check_room(weight_bytes: int, kv_bytes: int, device: torch.device) -> None:
    """Raise ConfigError, saying how much is missing, unless both fit in what is free on a GPU.

    ``kv_bytes`` is 0 where the pool's memory is there already. Other devices are not asked.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # What torch keeps for later allocations is free for these, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    missing = weight_bytes + kv_bytes - free
    if missing > 0:
        raise ConfigError(
            f"{device} has no room for the model: weights need {_mib(weight_bytes)} MiB and KV {_mib(kv_bytes)} MiB, "
            f"and of {_mib(total)} MiB {free // _MIB:,} MiB are free: {_mib(missing)} MiB are missing; give it fewer "
            "KV blocks or a smaller data type"
        )


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // _MIB):,}"
