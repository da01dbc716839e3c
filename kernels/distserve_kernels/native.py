"""Loads the native CPU library and calls it with the addresses of torch tensors.

The library is plain C (`csrc/`), built when the package is installed; `library` is None where it was not built, where
the processor lacks AVX-512 BF16, or where DISTSERVE_NATIVE=0 (the values avx512 and amx cap what is used). It uses
torch's own OpenMP threads, as many as `torch.get_num_threads()`, and ctypes releases the interpreter lock while it
runs. Callers check shapes, types and layout first: nothing is checked here.
"""

import ctypes
import mmap
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_LEVELS = {"0": 0, "avx512": 1, "amx": 2}
_HUGE_PAGE = 2 << 20
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class RopeWrite(ctypes.Structure):
    """`RopeWrite` of csrc/common.h."""

    _fields_ = [
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("rotary_dim", _LONG),
        ("slots", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("eps", _FLOAT),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("k_block_stride", _LONG),
        ("v_block_stride", _LONG),
        ("block_size", _LONG),
        ("num_heads", _LONG),
        ("num_kv_heads", _LONG),
        ("head_dim", _LONG),
    ]


class Attention(ctypes.Structure):
    """`Attention` of csrc/common.h."""

    _fields_ = [
        ("q", _POINTER),
        ("ldq", _LONG),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("k_block_stride", _LONG),
        ("v_block_stride", _LONG),
        ("block_tables", _POINTER),
        ("table_stride", _LONG),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("num_sequences", _LONG),
        ("num_heads", _LONG),
        ("num_kv_heads", _LONG),
        ("head_dim", _LONG),
        ("block_size", _LONG),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("sliding_window", _LONG),
        ("sinks", _POINTER),
        ("out", _POINTER),
        ("ldo", _LONG),
    ]


class Weight(ctypes.Structure):
    """`Weight` of csrc/common.h."""

    _fields_ = [("data", _POINTER), ("bias", _POINTER), ("n", _LONG), ("k", _LONG)]


class Layer(ctypes.Structure):
    """`Layer` of csrc/decoder.c."""

    _fields_ = [
        ("input_norm", _POINTER),
        ("post_attention_norm", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("qkv", Weight),
        ("o_proj", Weight),
        ("gate_up", Weight),
        ("down", Weight),
        ("sliding_window", _LONG),
    ]


class Step(ctypes.Structure):
    """`Step` of csrc/decoder.c."""

    _fields_ = [
        ("layers", _POINTER),
        ("k_caches", _POINTER),
        ("v_caches", _POINTER),
        ("first", _LONG),
        ("last", _LONG),
        ("halves", _LONG),
        ("hidden_size", _LONG),
        ("intermediate_size", _LONG),
        ("num_heads", _LONG),
        ("num_kv_heads", _LONG),
        ("head_dim", _LONG),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("unused", _FLOAT),
        ("num_tokens", _LONG),
        ("num_sequences", _LONG),
        ("hidden", _POINTER),
        ("partial", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("rotary_dim", _LONG),
        ("slots", _POINTER),
        ("block_tables", _POINTER),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("table_stride", _LONG),
        ("k_block_stride", _LONG),
        ("v_block_stride", _LONG),
        ("block_size", _LONG),
    ]


def _load() -> ctypes.CDLL | None:
    wanted = os.environ.get("DISTSERVE_NATIVE", "amx")
    if wanted not in _LEVELS:
        raise ValueError(f"DISTSERVE_NATIVE={wanted!r}: the highest level to use must be one of {', '.join(_LEVELS)}")
    highest = _LEVELS[wanted]
    candidates = (Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in candidates if path.exists()), None)
    if path is None or highest == 0:
        return None
    loaded = ctypes.CDLL(str(path))
    # One pool of threads per process: torch's. A lookup through torch's library searches the OpenMP it was linked to.
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        openmp = [
            ctypes.cast(getattr(torch_cpu, name), _POINTER)
            for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        ]
    except AttributeError:
        return None
    if loaded.ds_initialize(highest, *openmp) == 0:
        return None
    loaded.ds_pack_weight.argtypes = [_POINTER, _LONG, _LONG, _LONG, _POINTER]
    loaded.ds_linear.argtypes = [
        *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _INT)
    ]
    loaded.ds_rms_norm.argtypes = [_POINTER, _LONG, _POINTER, _POINTER, _FLOAT, _LONG, _LONG, _POINTER, _INT]
    loaded.ds_silu_mul.argtypes = [_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT]
    loaded.ds_rope_write.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT]
    loaded.ds_attention_scratch.argtypes = [_POINTER, _INT]
    loaded.ds_attention_scratch.restype = _LONG
    loaded.ds_paged_attention.argtypes = [_POINTER, _POINTER, _INT]
    loaded.ds_decoder_scratch.argtypes = [_POINTER, _INT]
    loaded.ds_decoder_scratch.restype = _LONG
    loaded.ds_decoder_run.argtypes = [_POINTER, _POINTER, _INT]
    return loaded


library = _load()


def is_native(*tensors: Tensor) -> bool:
    """Whether the library exists and all tensors are bfloat16 on the CPU."""
    return library is not None and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def cache_is_native(cache: Tensor) -> bool:
    """Whether a cache [N, P, K, D] has a layout the library reads: contiguous blocks, sizes that fill its tiles."""
    _, block_size, num_kv_heads, head_dim = cache.shape
    return (
        is_native(cache)
        and cache.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)
        and block_size % 16 == 0
        and head_dim % 32 == 0
        and head_dim <= 256
    )


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element is; None for None."""
    return None if tensor is None else tensor.data_ptr()


def huge_bytes(num_bytes: int) -> Tensor:
    """Zeroed bytes [num_bytes] on huge pages where the system has them: fewer address translations per read."""
    if num_bytes < _HUGE_PAGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    # Private: huge pages for shared anonymous memory are a separate setting, off by default.
    region = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(region, dtype=torch.uint8)
    start = -everything.data_ptr() % _HUGE_PAGE
    return everything[start : start + num_bytes]


class Scratch:
    """Memory that grows to the largest request, kept between calls; one per thread of callers."""

    def __init__(self) -> None:
        """Starts empty."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """``num_bytes`` of it [num_bytes], valid until the next call; what they hold is arbitrary."""
        if self._bytes.numel() < num_bytes:
            self._bytes = huge_bytes(num_bytes)
        return self._bytes[:num_bytes]
