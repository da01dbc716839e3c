"""YAML files as users write them: read with the line of every key, so that a mistake is shown where it is."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distserve.core.errors import ConfigError

Lines = dict[tuple[str, ...], int]
"""The line of each key, by the key's path."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The sections of a file, and where their keys are.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has no keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        data = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `model: ./my-llama`")
    return data, dict(_lines(root, ()))


def beside(path: Path, base: Path) -> Path:
    """A path that a file in ``base`` says: as it is or, if only that is there, relative to ``base``. ``~`` is home."""
    path = path.expanduser()
    return base / path if not path.exists() and (base / path).exists() else path


def _lines(node: yaml.Node | None, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    found = []
    for key, value in node.value:
        here = (*path, str(key.value))
        found.append((here, key.start_mark.line + 1))
        found.extend(_lines(value, here))
    return found


def explain(
    error: ValidationError, path: Path | None, lines: Lines, flags: Mapping[str, Any], root: type[BaseModel]
) -> str:
    """One sentence per mistake: where it is, what is wrong, what would be valid.

    ``flags`` are command-line values by the path of the key they stand for; ``root`` is the model of the whole file.
    """
    sentences = []
    for problem in error.errors():
        # pydantic adds the member of a union to the path; our keys are those a section or the file can have.
        loc = tuple(str(part) for part in problem["loc"] if part not in {"text", "pools"})
        name = ".".join(loc)
        if flags.get(name) is not None:
            where = f"--{loc[-1].replace('_', '-')}" if loc[-1] != "instances" else f"--{loc[-2]}"
        else:
            line = next((lines[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in lines), None)
            where = f"{path}, line {line}: {name}" if line is not None else f"{path}: {name}" if path else name
        if problem["type"] == "extra_forbidden":
            known = _keys_at(root, loc[:-1])
            sentences.append(f"{where} is unknown; known here: {', '.join(known)}")
        elif name == "placement":
            sentences.append(
                f"{where}: must be auto, the path of a plan, or pools, such as {{prefill: {{instances: 2}}, ...}}"
            )
        elif problem["type"] == "missing":
            sentences.append(f"{where} is missing")
        elif problem["type"] == "value_error":
            sentences.append(f"{where}: {problem['ctx']['error']}")
        else:
            message = problem["msg"].removeprefix("Input should be ")
            sentences.append(f"{where}: {problem['input']!r} is wrong, must be {message}")
    return "\n".join(dict.fromkeys(sentences))


def _keys_at(root: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    section: Any = root
    for name in path:
        section = next(_sections_in(section.model_fields[name].annotation))
    return sorted(section.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within a type, through unions and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
