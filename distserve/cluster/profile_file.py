"""Profiles as JSON files: written by ``distserve profile``, read by whoever predicts with them. Light to import."""

from pathlib import Path

import msgspec

from distserve.core.errors import ConfigError
from distserve.core.profile import FORMAT, Profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write ``profile``, indented for human eyes; raises ConfigError if ``path`` cannot be written."""
    data = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    try:
        path.write_bytes(data + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def read_profile(path: Path) -> Profile:
    """Read and check a profile; raises ConfigError that says what is wrong with it."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no profile: {error}. Make one by `distserve profile MODEL`.") from error
    if profile.format != FORMAT:
        raise ConfigError(f"{path} has the format {profile.format!r}, this version reads {FORMAT!r}: profile anew")
    return profile
