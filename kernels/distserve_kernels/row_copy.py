"""Copying scattered rows of bytes between memories: KV blocks from a peer's pool to one's own, in one pass."""

import torch
from torch import Tensor

from distserve_kernels.gpu.support import has_triton


def copy_rows(
    src: Tensor,
    dst: Tensor,
    starts: Tensor,
    row_bytes: int,
    num_planes: int,
    src_stride: int,
    dst_stride: int,
    *,
    unit: int = 1,
) -> None:
    """Copies rows of ``row_bytes`` bytes, the same ones in each of ``num_planes`` planes.

    Row ``i`` of plane ``p`` is at ``starts[0, i] + p * src_stride`` of ``src``, and goes to
    ``starts[1, i] + p * dst_stride`` of ``dst``. The other bytes of ``dst`` stay as they are.

    Args:
        src: flat uint8, on the device of ``dst`` or on one whose memory that can read.
        dst: flat uint8; rows do not overlap in it.
        starts: [2, n] int64 on the device of ``dst``, in bytes. Not checked on a GPU: within the memories.
        row_bytes: at least 1.
        num_planes: at least 0.
        src_stride: bytes from a plane to the next.
        dst_stride: likewise.
        unit: bytes that all of ``starts`` are multiples of, for the caller knows that without asking the device: the
            more twos it has in it, the faster the copy.
    """
    if starts.shape[1] == 0 or num_planes == 0:
        return
    if src.is_cuda and dst.is_cuda and has_triton():
        from distserve_kernels.gpu import row_copy

        row_copy.copy_rows(src, dst, starts, row_bytes, num_planes, src_stride, dst_stride, unit)
        return
    within = torch.arange(row_bytes, device=dst.device)
    src_index, dst_index = (starts[side][:, None] + within for side in (0, 1))
    for plane in range(num_planes):
        rows = src[plane * src_stride :][src_index.to(src.device)]
        dst[plane * dst_stride :][dst_index] = rows.to(dst.device)
