"""Asks a GPU what memory it has, and a model what it takes there, in a process of its own.

So the launcher neither imports torch nor keeps a CUDA context. ``python -m distserve.cluster.gpu_probe DIRECTORY DTYPE
INDEX`` prints a :class:`GpuFacts`, or what is wrong, as JSON.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from distserve.cluster.gpu_memory import CardMemory, ModelMemory
from distserve.cluster.process import die_with_parent
from distserve.core.errors import ConfigError

_WRONG = 3
"""Exit status when the user is at fault; the message is on standard output."""
_ROW_COPIES = 6
"""Numbers of float32 size that sampling holds per logit: sorted values and their indices, weights, sums."""


class GpuFacts(msgspec.Struct, frozen=True):
    """A card and what one model takes of it."""

    card: CardMemory
    model: ModelMemory


def probe_gpu(model_dir: Path, dtype: str, index: int) -> GpuFacts:
    """Facts of GPU ``index``, as this process's environment numbers them, and of the model in ``model_dir`` on it.

    Raises ConfigError if there is no such GPU, torch cannot use it, or the model directory is damaged.
    """
    command = [sys.executable, "-m", __spec__.name, str(model_dir), dtype, str(index)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    if done.returncode == _WRONG:
        raise ConfigError(done.stdout.decode())
    if done.returncode != 0:
        raise ConfigError(f"GPU {index} could not be examined: {done.stderr.decode(errors='replace').strip()}")
    return msgspec.json.decode(done.stdout, type=GpuFacts)


def visible_as(index: int, environment: Mapping[str, str]) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` must be for a process to see only what is GPU ``index`` in ``environment``."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[index].strip() if visible else str(index)


def model_memory(config: Any, dtype: str, *, weights: int, token_kv: int) -> ModelMemory:
    """What a model of transformers' configuration ``config`` takes, by the sizes of its tensors. An upper estimate.

    Per token: the residual stream with its copies, queries, keys and values, the output of attention, and the two
    halves of the MLP's middle, of each expert that a token goes to.
    """
    size = {"float32": 4, "bfloat16": 2}[dtype]
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or hidden // num_heads
    num_experts = getattr(config, "num_experts_per_tok", None) or 1
    middle = next(
        (
            width
            for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
            if (width := getattr(config, name, None))
        ),
        4 * hidden,
    )
    numbers = 6 * hidden + 2 * (num_heads + num_kv_heads) * head_dim + 3 * num_experts * middle
    return ModelMemory(
        dtype=dtype,
        weights=weights,
        token_kv=token_kv,
        token_activations=numbers * size,
        row_logits=config.vocab_size * (size + 4),
        row_sampling=config.vocab_size * 4 * _ROW_COPIES,
    )


def _card(index: int) -> CardMemory:
    import torch

    from distserve.transfer.cuda_ipc.cuda import check_cuda

    check_cuda(index)
    # What this process's own context takes counts as used: it is an estimate on the safe side.
    free, total = torch.cuda.mem_get_info(index)
    return CardMemory(index, torch.cuda.get_device_name(index), total, free)


def main() -> None:
    """Examine GPU ``argv[3]`` for the model in ``argv[1]`` in the data type ``argv[2]``."""
    die_with_parent()
    from distserve.engine.description import describe_config, load_config

    directory, dtype, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        card = _card(index)
        config = load_config(directory)
        description = describe_config(config, directory)
    except ConfigError as error:
        sys.stdout.write(str(error))
        sys.exit(_WRONG)
    sizes = {"weights": description.weight_bytes(dtype), "token_kv": description.token_bytes(dtype)}
    sys.stdout.write(msgspec.json.encode(GpuFacts(card, model_memory(config, dtype, **sizes))).decode())


if __name__ == "__main__":
    main()
