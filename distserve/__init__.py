"""Disaggregated serving of large language models: prefill and decode on separate instances.

What programs use is at the top (``from distserve import LLM``) and loaded when it is first asked for: importing this
package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_OFFERED = {
    "LLM": "distserve.offline.llm",
    "SamplingParams": "distserve.offline.params",
    "Chat": "distserve.offline.params",
    "RequestOutput": "distserve.offline.outputs",
    "CompletionOutput": "distserve.offline.outputs",
    "Delta": "distserve.offline.outputs",
}
"""Module of each name; ``__init__.pyi`` says the same to type checkers."""


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
