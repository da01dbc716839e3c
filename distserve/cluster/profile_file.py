"""Profiles as JSON files: written by ``distserve profile``, read by whoever predicts with them. Light to import."""

from pathlib import Path
from typing import Any

import msgspec

from distserve.bench.files import write_atomically
from distserve.core.errors import ConfigError
from distserve.core.profile import FORMAT, Profile

_ONE_SHAPE = "distserve-profile/2"
"""Files of this format are of instances of one rank, without saying so; all else is as it is now."""


def write_profile(profile: Profile, path: Path) -> None:
    """Write ``profile``, indented for human eyes, whole or not at all; raises ConfigError if it cannot be written."""
    data = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(data + b"\n"))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def read_profile(path: Path) -> Profile:
    """Read and check a profile, of this format or the one before; raises ConfigError, saying what is wrong."""
    try:
        data = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        found = data.get("format")
        if found == _ONE_SHAPE:
            data = _with_shapes(data)
        elif isinstance(found, str) and found != FORMAT:
            raise ConfigError(f"{path} has the format {found!r}, this version reads {FORMAT!r}: profile anew")
        return msgspec.convert(data, Profile)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no profile: {error}. Make one by `distserve profile MODEL`.") from error


def _with_shapes(data: dict[str, Any]) -> dict[str, Any]:
    """A file of the format before in today's terms."""
    one = {name: data[name] for name in ("fit", "measurements", "residuals") if name in data}
    kept = {name: value for name, value in data.items() if name not in one}
    return kept | {"format": FORMAT, "shapes": [{"parallel": {"tp": 1, "pp": 1}} | one]}
