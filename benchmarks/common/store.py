"""Results of a long measurement, a file for each, so that it can be made in slices and goes on where it stopped."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distserve.bench.files import write_atomically

_SUFFIX = ".json.gz"


@dataclass(frozen=True)
class Store:
    """JSON values by names such as ``chat/vllm/1``, below ``directory``. A value is there whole or not at all."""

    directory: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        """The value of ``name``, which is there."""
        value: dict[str, Any] = json.loads(gzip.decompress(self._path(name).read_bytes()))
        return value

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Keep ``value``; the same value gives the same bytes."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = gzip.compress((json.dumps(value) + "\n").encode(), mtime=0)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    def names(self, prefix: str = "") -> Iterator[str]:
        """Those that begin with ``prefix``, a folder, in order."""
        for path in sorted((self.directory / prefix).rglob(f"[!.]*{_SUFFIX}")):
            yield path.relative_to(self.directory).as_posix().removesuffix(_SUFFIX)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{_SUFFIX}"
