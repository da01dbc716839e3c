"""From what was observed to the command that plans for it: a trace, and the configuration that names it."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from distserve.core.errors import ConfigError
from placement.watch import LoadWatch


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a configuration, unchecked.

    Raises:
        ConfigError: it cannot be read, or has no sections.
    """
    try:
        data: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{file}: expected keys and values, such as `model: ./my-llama`")
    return data or {}


def write_replan(file: Path, directory: Path, watch: LoadWatch, now: float) -> str:
    """Write the observed load into ``directory`` and a copy of the configuration ``file`` that plans for it.

    Returns the command that does. What an earlier observation wrote is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trace, config = (directory / f"{file.stem}.observed.{suffix}" for suffix in ("csv", "yaml"))
    watch.write_trace(trace, now)
    rate = watch.observed(now).num_arrivals / watch.observed(now).span
    data = read_yaml(file) | {"workload": {"trace": str(trace.resolve())}, "placement": "auto"}
    data.pop("prediction", None)
    config.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return f"distserve plan {shlex.quote(str(config))} --rate {rate:.3g}"
