"""Triton kernels: what `distserve_kernels` runs on CUDA tensors.

One operation per module. Each module's public function takes the arguments of the plain torch definition of the same
name in `distserve_kernels.reference` (or `routing`, `random_numbers`, `kv_pieces`), launches without ever waiting for
the device, and may be captured in a CUDA graph. Nothing here checks that a tensor is on a GPU: under
``TRITON_INTERPRET=1``, set before triton is first imported, everything runs on CPU tensors too, slowly.

These modules import triton when they are imported, so nothing outside this package imports them but on a CUDA tensor:
`support.runs_here` says whether it should.
"""
