"""The kernels as the engine calls them: each picks the fastest implementation that supports its arguments."""

from distserve_kernels.reference import (
    add_rms_norm,
    paged_attention,
    rms_norm,
    rope_and_write_kv,
    silu_mul,
    write_kv,
)

__all__ = [
    "add_rms_norm",
    "native_available",
    "paged_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_mul",
    "write_kv",
]


def native_available() -> bool:
    """Whether this process runs native CPU code."""
    return False
