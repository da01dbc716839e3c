"""What the launcher learns of a model, from a process of its own."""

import pytest

from distserve.cluster.describe import Description
from distserve.demo import model_dir
from distserve_kernels import native_available


@pytest.mark.parametrize(
    ("dtype", "level", "expected"),
    [("bfloat16", "amx", native_available()), ("bfloat16", "0", False), ("float32", "0", True)],
)
def test_a_machine_without_native_code_is_known(
    monkeypatch: pytest.MonkeyPatch, dtype: str, level: str, expected: bool
) -> None:
    monkeypatch.setenv("DISTSERVE_NATIVE", level)
    with Description(model_dir(), dtype) as description:
        assert description.result().is_native is expected
