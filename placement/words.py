"""Figures for people: units and digits as reports and plots show them."""

import math


def share(value: float) -> str:
    """``0.931`` as ``93%``; one digit more where it matters, close to 0 and 1."""
    digits = 1 if 0 < value < 0.0995 or 0.9005 < value < 1 else 0
    return f"{value:.{digits}%}"


def milliseconds(value: float) -> str:
    """Seconds as milliseconds with three digits or all whole ones; ``-`` where there is no value."""
    if not math.isfinite(value):
        return "-"
    return f"{value * 1000:.0f}" if value >= 0.1 else f"{value * 1000:.3g}"


def seconds(value: float) -> str:
    """Seconds in the unit that fits: ``12 ms``, ``3.4 s``."""
    if not math.isfinite(value):
        return "-"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1000:.3g} ms" if value >= 1e-4 or value == 0 else f"{value * 1e6:.3g} us"


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.3g} B"


def gigabytes(rate: float) -> str:
    """Bytes/s in the unit that fits."""
    return f"{size(rate)}/s"


def per_gpu(value: float) -> str:
    """Goodput per GPU."""
    return f"{value:.3g} requests/s per GPU"
