"""The GPUs whose step times can be predicted: what their data sheets say.

Peaks are dense (no sparsity) 16-bit tensor-core rates with 32-bit accumulation; what of a peak is reached is
:mod:`simulator.latency.efficiency`'s business. Link bandwidths are what one GPU sends, and at the same time receives.
"""

import difflib
from dataclasses import dataclass

from distserve.core.errors import ConfigError

_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of GPU.

    ``memory_bandwidth`` and ``link_bandwidth`` in bytes/s, ``flops`` in multiply and add operations/s counted apart,
    ``kernels`` names the card whose fitted coefficients it uses, ``default`` if none is like it. ``nvlink`` False: GPUs
    of a node talk over PCIe.
    """

    name: str
    kernels: str
    memory_bytes: int
    memory_bandwidth: float
    flops: float
    num_sms: int
    link_bandwidth: float
    nvlink: bool


# NVIDIA's data sheets: A100 (2021), H100 and H200 (2024), B200 (2025), L40S, A10, L4, GeForce RTX 4090, RTX PRO 6000
# Blackwell Server Edition. "cpu" stands for one slot of a CPU cluster: a few server cores of one socket, nominal.
GPUS: tuple[GpuSpec, ...] = (
    GpuSpec("a100-40g-pcie", "a100-pcie", 40 * _GIB, 1555e9, 312e12, 108, 32e9, nvlink=False),
    GpuSpec("a100-40g-sxm", "a100", 40 * _GIB, 1555e9, 312e12, 108, 300e9, nvlink=True),
    GpuSpec("a100-80g-pcie", "a100-pcie", 80 * _GIB, 1935e9, 312e12, 108, 32e9, nvlink=False),
    GpuSpec("a100-80g-sxm", "a100", 80 * _GIB, 2039e9, 312e12, 108, 300e9, nvlink=True),
    GpuSpec("h100-pcie", "h100-pcie", 80 * _GIB, 2039e9, 756e12, 114, 64e9, nvlink=False),
    GpuSpec("h100-sxm", "h100", 80 * _GIB, 3350e9, 989e12, 132, 450e9, nvlink=True),
    GpuSpec("h200", "h200", int(141e9), 4800e9, 989e12, 132, 450e9, nvlink=True),
    GpuSpec("b200", "b200", int(180e9), 7700e9, 2250e12, 148, 900e9, nvlink=True),
    GpuSpec("l40s", "l40s", 48 * _GIB, 864e9, 362e12, 142, 32e9, nvlink=False),
    GpuSpec("a10", "l40s", 24 * _GIB, 600e9, 125e12, 72, 32e9, nvlink=False),
    GpuSpec("l4", "l40s", 24 * _GIB, 300e9, 121e12, 58, 16e9, nvlink=False),
    GpuSpec("rtx4090", "rtx4090", 24 * _GIB, 1008e9, 165.2e12, 128, 32e9, nvlink=False),
    GpuSpec("rtx-pro-6000", "rtx-pro-6000", 96 * _GIB, 1597e9, 480e12, 188, 64e9, nvlink=False),
    GpuSpec("cpu", "default", 16 * _GIB, 20e9, 0.5e12, 1, 10e9, nvlink=False),
)
_BY_NAME = {gpu.name: gpu for gpu in GPUS}


def find_gpu(name: str) -> GpuSpec:
    """The GPU called ``name``, however its case, blanks and underscores are written.

    Raises ConfigError with the nearest names if there is none.
    """
    wanted = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    if wanted in _BY_NAME:
        return _BY_NAME[wanted]
    # Another variant of the same card is nearer than a name that happens to be spelt alike.
    card = wanted.split("-")[0]
    variants = [gpu for gpu in _BY_NAME if gpu.split("-")[0] == card and any(c.isdigit() for c in card)]
    near = [gpu for gpu in _BY_NAME if wanted and gpu.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, variants or _BY_NAME, n=2, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"unknown GPU {name!r}.{hint} Known: {', '.join(_BY_NAME)}")
