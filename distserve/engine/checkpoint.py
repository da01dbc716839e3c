"""What a directory of safetensors files holds, read from their headers alone.

Promises that a checkpoint it has accepted can be read: every named file is there and as long as its header says.
Reads no tensor data.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length N, N bytes of JSON, data).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from distserve.core.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a checkpoint and how many numbers are in them."""

    files: tuple[Path, ...]
    num_parameters: int


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in ``path``.

    Raises:
        ConfigError: it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def inspect_checkpoint(model_dir: Path) -> Checkpoint:
    """Find and check the weights in ``model_dir``.

    Raises:
        ConfigError: there are none, a file is missing, damaged or shorter than its header says.
    """
    files = _weight_files(model_dir)
    return Checkpoint(files, sum(_count_parameters(file) for file in files))


def _weight_files(model_dir: Path) -> tuple[Path, ...]:
    index = model_dir / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map: the index does not say which file holds which tensor")
        files = tuple(model_dir / str(name) for name in sorted(set(weight_map.values())))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(f"{model_dir} lacks {', '.join(missing)}, which {_INDEX} names; copy the files again")
        return files
    if (model_dir / _SINGLE).is_file():
        return (model_dir / _SINGLE,)
    pickled = sorted(file.name for file in model_dir.glob("*.bin"))
    if pickled:
        raise ConfigError(
            f"{model_dir} has weights only as {pickled[0]}; pickle files are not read because they can run code. "
            "Convert them with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ConfigError(f"{model_dir} has no weights: expected {_SINGLE} or {_INDEX}")


def _count_parameters(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or not 2 <= length <= _MAX_HEADER_BYTES:
            raise ConfigError(f"{file} is not a safetensors file (or was cut off); copy it again")
        if size < _LENGTH_BYTES + length:
            raise ConfigError(f"{file} is truncated: its header alone takes {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            needed = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
            num_parameters: int = sum(math.prod(entry["shape"]) for entry in tensors)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} has a damaged header ({error}); copy it again") from error
    if size != needed:
        state = "truncated" if size < needed else "damaged"
        raise ConfigError(f"{file} is {state}: its header promises {needed} bytes, the file has {size}; copy it again")
    return num_parameters
