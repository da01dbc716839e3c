"""The GPUs whose step times can be predicted: what their data sheets say.

Peaks are dense (no sparsity) 16-bit tensor-core rates with 32-bit accumulation; what of a peak is reached is
:mod:`simulator.latency.efficiency`'s business. Link bandwidths are what one GPU sends, and at the same time receives.
"""

import difflib
from dataclasses import dataclass

from distserve.core.errors import ConfigError

_GIB = 1024**3
_N5 = 0.7


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of GPU.

    ``memory_bandwidth`` and ``link_bandwidth`` in bytes/s, ``flops`` in multiply and add operations/s counted apart,
    ``kernels`` names the card whose fitted coefficients it uses, ``default`` if none is like it. ``nvlink`` False: GPUs
    of a node talk over PCIe. ``power``: the board's limit in watts. ``energy``: of an operation in its chip's process,
    beside TSMC's 7 nm. ``throttle``: the share of its tensor cores' rate at which they accumulate in 32 bits; GeForce
    cards halve it, so that ``flops`` is half of what the same cores could be fed for.
    """

    name: str
    kernels: str
    memory_bytes: int
    memory_bandwidth: float
    flops: float
    num_sms: int
    link_bandwidth: float
    nvlink: bool
    power: float
    energy: float = 1.0
    throttle: float = 1.0

    @property
    def power_clock(self) -> float:
        """The clock that the power limit lets matrix products run at, up to a factor all cards of one kind share.

        Power goes with clock x voltage^2, and voltage with clock: the clock that is left goes with the cube root of the
        watts that there are for an operation at peak rate.
        """
        return float((self.power / (self.flops / self.throttle / 1e12) / self.energy) ** (1 / 3))


# NVIDIA's data sheets: A100 (2021), H100 and H200 (2024), B200 (2025), L40S, A10, L4, GeForce RTX 4090, RTX PRO 6000
# Blackwell Server Edition. _N5: TSMC states 30% less power at the same speed than 7 nm for its 5 nm process, of which
# those of Hopper, Ada and Blackwell are variants. The A10 is made in Samsung's 8 nm, taken as no better than 7.
# The RTX 4090's memory is what CUDA reports, 2% less than 24 GiB: the driver keeps the rest.
# "cpu" stands for one slot of a CPU cluster: a few server cores of one socket, nominal.
GPUS: tuple[GpuSpec, ...] = (
    GpuSpec("a100-40g-pcie", "a100-pcie", 40 * _GIB, 1555e9, 312e12, 108, 32e9, nvlink=False, power=250),
    GpuSpec("a100-40g-sxm", "a100", 40 * _GIB, 1555e9, 312e12, 108, 300e9, nvlink=True, power=400),
    GpuSpec("a100-80g-pcie", "a100-pcie", 80 * _GIB, 1935e9, 312e12, 108, 32e9, nvlink=False, power=300),
    GpuSpec("a100-80g-sxm", "a100", 80 * _GIB, 2039e9, 312e12, 108, 300e9, nvlink=True, power=400),
    GpuSpec("h100-pcie", "h100-pcie", 80 * _GIB, 2039e9, 756e12, 114, 64e9, nvlink=False, power=350, energy=_N5),
    GpuSpec("h100-sxm", "h100", 80 * _GIB, 3350e9, 989e12, 132, 450e9, nvlink=True, power=700, energy=_N5),
    GpuSpec("h200", "h200", int(141e9), 4800e9, 989e12, 132, 450e9, nvlink=True, power=700, energy=_N5),
    GpuSpec("b200", "b200", int(180e9), 7700e9, 2250e12, 148, 900e9, nvlink=True, power=1000, energy=_N5),
    GpuSpec("l40s", "l40s", 48 * _GIB, 864e9, 362e12, 142, 32e9, nvlink=False, power=350, energy=_N5),
    GpuSpec("a10", "a10", 24 * _GIB, 600e9, 125e12, 72, 32e9, nvlink=False, power=150),
    GpuSpec("l4", "l4", 24 * _GIB, 300e9, 121e12, 58, 16e9, nvlink=False, power=72, energy=_N5),
    GpuSpec(
        "rtx4090",
        "rtx4090",
        25_250_627_584,
        1008e9,
        165.2e12,
        128,
        32e9,
        nvlink=False,
        power=450,
        energy=_N5,
        throttle=0.5,
    ),
    GpuSpec("rtx-pro-6000", "rtx-pro-6000", 96 * _GIB, 1597e9, 480e12, 188, 64e9, nvlink=False, power=600, energy=_N5),
    GpuSpec("cpu", "default", 16 * _GIB, 20e9, 0.5e12, 1, 10e9, nvlink=False, power=200),
)
# Coefficients of cards that were not measured: those of the card with the same cores, at their own clock.
BORROWED = {"a100-pcie": "a100", "h100-pcie": "h100", "a10": "l40s", "l4": "l40s"}
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
