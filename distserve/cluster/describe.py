"""Describes a model in a process of its own, so that the launcher never imports torch and Ray can start meanwhile.

``python -m distserve.cluster.describe DIRECTORY`` prints a :class:`ModelFacts`, or what is wrong, as JSON.
"""

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from distserve.cluster.process import die_with_parent
from distserve.core.errors import ConfigError

_WRONG = 3
"""Exit status when the model directory is at fault; the message is on standard output."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What the launcher plans with, for one data type: bytes of weights and of KV per token, context length, sizes.

    ``is_native``: this machine's processor has native code for the data type, or the type never has any.
    """

    weight_bytes: int
    token_bytes: int
    max_model_len: int
    num_layers: int
    num_kv_heads: int
    is_native: bool = True


class Description:
    """A description on its way; also a context manager that ends the child, should it still run.

    Args:
        model_dir: Hugging Face model directory.
        dtype: ``float32`` or ``bfloat16``.
    """

    def __init__(self, model_dir: Path, dtype: str) -> None:
        self._child = subprocess.Popen(  # noqa: S603 - our own module, our own interpreter
            [sys.executable, "-m", __spec__.name, str(model_dir), dtype],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def result(self) -> ModelFacts:
        """Wait for the facts.

        Raises:
            ConfigError: the model directory is damaged, or the model cannot be served exactly.
        """
        output, errors = self._child.communicate()
        if self._child.returncode == _WRONG:
            raise ConfigError(output.decode())
        if self._child.returncode != 0:
            raise ConfigError(f"the model could not be examined: {errors.decode(errors='replace').strip()}")
        return msgspec.json.decode(output, type=ModelFacts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def examine(model_dir: Path, dtype: str) -> ModelFacts:
    """The facts, found in this process. Raises ConfigError and UnsupportedModelError."""
    from distserve.engine.description import describe
    from distserve_kernels import native_available

    description = describe(model_dir)
    return ModelFacts(
        weight_bytes=description.weight_bytes(dtype),
        token_bytes=description.token_bytes(dtype),
        max_model_len=description.max_model_len,
        num_layers=description.num_layers,
        num_kv_heads=description.num_kv_heads,
        is_native=dtype != "bfloat16" or native_available(),
    )


def main() -> None:
    """Describe the model in ``argv[1]`` for the data type ``argv[2]``."""
    die_with_parent()
    directory, dtype = sys.argv[1:]
    try:
        facts = examine(Path(directory), dtype)
    except ConfigError as error:
        sys.stdout.write(str(error))
        sys.exit(_WRONG)
    sys.stdout.write(msgspec.json.encode(facts).decode())


if __name__ == "__main__":
    main()
