"""Compiles for a Hopper GPU on a machine without one: a driver for triton that has a target but launches nothing.

Run as a program it calls every operation of `distserve_kernels.gpu` and prints, per kernel and variant, what the
assembler made of it, one JSON object per line.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_BYTES = 227 * 1024
"""Shared memory one block may have on an H100 or H200."""


class HopperDriver:
    """Target sm_90; loads and launches nothing."""

    def __init__(self) -> None:
        self.kernels: list[object] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> object:
        return lambda *_: None


@contextmanager
def compiling() -> Iterator[list[tuple[str, bytes, int]]]:
    """Launches compile instead; yields the list of (kernel, binary, shared memory bytes) they come to."""
    compiled: list[tuple[str, bytes, int]] = []

    def keep(_module: object, _function: object, name: str, metadata_group: dict[str, str], _hash: str) -> None:
        metadata = json.loads(Path(metadata_group[f"{name}.json"]).read_text())
        compiled.append((name, Path(metadata_group[f"{name}.cubin"]).read_bytes(), metadata["shared"]))

    driver.set_active(HopperDriver())
    triton.knobs.runtime.kernel_load_end_hook.add(keep)
    yield compiled
    triton.knobs.runtime.kernel_load_end_hook.remove(keep)


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def facts(name: str, binary: bytes, shared: int) -> dict[str, object]:
    """Registers, bytes of spilled registers, and which memory and matrix instructions a binary has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = tool("nvdisasm", file.name)
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = {
        key: len(re.findall(pattern, assembly))
        for key, pattern in {
            "wide_loads": r"LDG\.E\.128|LDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128",
            "loads": r"LDG\.E|LDGSTS",
            "async": "LDGSTS",
            "wide_stores": r"STG\.E\.128",
            "stores": r"STG\.E",
            "wgmma": "HGMMA",
            "mma": "HMMA",
        }.items()
    }
    return {"kernel": name, "shared": shared, "registers": counts["REG"], "stack": counts["STACK"], **found}
