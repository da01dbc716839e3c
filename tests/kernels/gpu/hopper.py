"""Compiles for a Hopper GPU on a machine without one: a driver for triton that has a target but launches nothing.

Run as a program it calls every operation of `distserve_kernels.gpu` in the data type named and prints, per kernel and
variant, what the assembler made of it, one JSON object per line.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distserve_kernels.gpu import attention, gate, grouped_matmul, kv_pieces, kv_write, norm, race, rotary

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
    """Registers, bytes of spilled registers, and which memory and matrix instructions a binary has.

    ``ahead`` counts the waits that leave loads in flight: without one, nothing is loaded while the tensor cores work.
    """
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
            "ahead": r"DEPBAR\.LE SB0, 0x[1-9]",
            "wide_stores": r"STG\.E\.128",
            "stores": r"STG\.E",
            "wgmma": "HGMMA",
            "mma": "HMMA",
        }.items()
    }
    return {"kernel": name, "shared": shared, "registers": counts["REG"], "stack": counts["STACK"], **found}


def attend(
    lengths: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, **options: float | None
) -> None:
    """Attention of sequences with so many queries each and room for 4096 tokens."""
    q = torch.empty(sum(lengths), heads[0], head_dim, dtype=dtype)
    cache = torch.empty(2, 16, heads[1], head_dim, dtype=dtype)
    tables = torch.zeros(len(lengths), 256, dtype=torch.int32)
    counts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    attention.paged_attention(q, cache, cache, tables, counts, counts[1:], scale=0.1, **options)


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel in the shapes of an 8B Llama (32 query heads, 8 KV heads, head dim 128), some in others too."""
    for head_dim in (64, 128):
        attend([1] * 64, (64, 8), head_dim, dtype)
        attend([100], (32, 8), head_dim, dtype)
    attend([1, 2], (32, 8), 128, dtype, sliding_window=100, softcap=30.0)
    x = torch.empty(8, 4096, dtype=dtype)
    norm.rms_norm(x, x[0], 1e-5)
    norm.add_rms_norm(x, x, x[0], 1e-5)
    gate.silu_mul(x)
    cache, slots, angles = (
        torch.empty(2, 16, 8, 128, dtype=dtype),
        torch.zeros(8, dtype=torch.int64),
        torch.empty(8, 128),
    )
    kv_write.write_kv(x.view(8, 32, 128)[:, :8], x.view(8, 32, 128)[:, :8], cache, cache, slots)
    rotary.rope(x.view(8, 32, 128), angles, angles)
    qkv = torch.empty(8, 48 * 128, dtype=dtype)
    rotary.rope_and_write_kv(qkv, angles, angles, cache, cache, slots, 32)
    rotary.rope_and_write_kv(qkv, angles, angles, cache, cache, slots, 32, q_norm=qkv[0, :128], k_norm=qkv[0, :128])
    pool, blocks = torch.empty(32, 2, 2, 16, 8, 128, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    for heads in (range(8), range(2, 4)):
        shape = (32, 2, 2, 16, len(heads), 128)
        kv_pieces.pack_kv(pool, blocks, range(32), heads, torch.empty(shape, dtype=dtype))
        kv_pieces.unpack_kv(torch.empty(shape, dtype=dtype), pool, blocks, range(32), heads)
    starts = torch.zeros(9, dtype=torch.int32)
    for num_rows in (8, 2048):
        rows, weights = torch.empty(num_rows, 1024, dtype=dtype), torch.empty(8, 512, 1024, dtype=dtype)
        grouped_matmul.grouped_matmul(rows, weights, starts)
        grouped_matmul.grouped_matmul(rows, torch.empty(8, 1024, 512, dtype=dtype).mT, starts)
    keys = race.philox_keys(slots, slots, slots)
    race.race_uniforms(keys, 5000)
    race.race_draw(torch.empty(8, 128256), keys)


if __name__ == "__main__":
    with compiling() as compiled:
        launch_all(getattr(torch, sys.argv[1]))
        for kernel in compiled:
            print(json.dumps(facts(*kernel)))
