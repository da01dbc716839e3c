"""Decoder layers of the Llama family run by the native library, a range of them per call."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from distserve_kernels import native
from distserve_kernels.decoder_types import DecoderLayer, DecoderShape, StepInputs
from distserve_kernels.linear import pack, packed_numel, packs_natively

ATTENTION_HALF = 1
MLP_HALF = 2


def layer_is_native(shape: DecoderShape, layer: DecoderLayer) -> bool:
    """Whether the native library runs this layer: bfloat16 on a supported CPU, sizes that fill its tiles."""
    matrices = (layer.qkv, layer.o_proj, layer.gate_up, layer.down)
    return (
        all(packs_natively(matrix) for matrix in matrices)
        and shape.head_dim % 32 == 0
        and shape.head_dim <= 256
        and shape.num_heads // shape.num_kv_heads <= 256
    )


class NativeLayers:
    """The packed layers and the memory their steps work in; one step at a time."""

    def __init__(self, shape: DecoderShape) -> None:
        """Starts without layers."""
        self._shape = shape
        self._layers: list[native.Layer] = []
        self._kept: list[Tensor] = []
        self._table = (native.Layer * 0)()
        self._scratch = native.Scratch()

    def append(self, layer: DecoderLayer) -> None:
        """Copies a layer's weights into the library's layout, in the order in which a step reads them."""
        matrices = {"qkv": layer.qkv, "o_proj": layer.o_proj, "gate_up": layer.gate_up, "down": layer.down}
        biases = {"qkv": layer.qkv_bias, "o_proj": layer.o_bias}
        storage = native.huge_bytes(2 * sum(packed_numel(m) for m in matrices.values())).view(torch.bfloat16)
        entry = native.Layer(sliding_window=layer.sliding_window or 0)
        begin = 0
        for name, matrix in matrices.items():
            part = storage[begin : begin + packed_numel(matrix)]
            begin += part.numel()
            pack(matrix, part)
            setattr(
                entry,
                name,
                native.Weight(part.data_ptr(), self._keep(biases.get(name)), matrix.shape[0], matrix.shape[1]),
            )
        entry.input_norm = self._keep(layer.input_norm)
        entry.post_attention_norm = self._keep(layer.post_attention_norm)
        entry.q_norm, entry.k_norm = self._keep(layer.q_norm), self._keep(layer.k_norm)
        self._kept.append(storage)
        self._layers.append(entry)
        self._table = (native.Layer * len(self._layers))(*self._layers)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        copy = tensor.detach().clone().to(torch.bfloat16).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def run(
        self,
        hidden: Tensor,
        step: StepInputs,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        first: int,
        last: int,
        *,
        halves: int = ATTENTION_HALF | MLP_HALF,
        partial: Tensor | None = None,
    ) -> None:
        """Adds layers ``first`` to ``last`` to hidden [T, hidden]; or writes one half's contribution to ``partial``.

        Raises:
            ValueError: the caches' layout is not one the library reads.
        """
        assert native.library is not None
        if not (native.cache_is_native(k_caches[first]) and native.cache_is_native(v_caches[first])):
            raise ValueError(
                "the KV cache must be bfloat16 [N, P, K, D] with contiguous blocks, P a multiple of 16 and D of 32; "
                f"got {k_caches[first].dtype} {tuple(k_caches[first].shape)}"
            )
        shape = self._shape
        num_layers = len(self._layers)
        k_pointers = (ctypes.c_void_p * num_layers)(*[cache.data_ptr() for cache in k_caches])
        v_pointers = (ctypes.c_void_p * num_layers)(*[cache.data_ptr() for cache in v_caches])
        # Contiguous in the library's types; the converted tensors live until the call returns.
        cos, sin, slots = step.cos.float().contiguous(), step.sin.float().contiguous(), step.slots.contiguous()
        tables, starts = step.block_tables.int().contiguous(), step.query_starts.int().contiguous()
        lens = step.context_lens.int().contiguous()
        call = native.Step(
            layers=ctypes.addressof(self._table),
            k_caches=ctypes.addressof(k_pointers),
            v_caches=ctypes.addressof(v_pointers),
            first=first,
            last=last,
            halves=halves,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            eps=shape.norm_eps,
            scale=shape.scale,
            softcap=shape.softcap or 0.0,
            num_tokens=hidden.shape[0],
            num_sequences=lens.shape[0],
            hidden=hidden.data_ptr(),
            partial=native.address(partial),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            rotary_dim=cos.shape[1],
            slots=slots.data_ptr(),
            block_tables=tables.data_ptr(),
            query_starts=starts.data_ptr(),
            context_lens=lens.data_ptr(),
            table_stride=tables.stride(0),
            k_block_stride=k_caches[first].stride(0),
            v_block_stride=v_caches[first].stride(0),
            block_size=k_caches[first].shape[1],
        )
        num_threads = torch.get_num_threads()
        pointer = ctypes.addressof(call)
        scratch = self._scratch.take(native.library.ds_decoder_scratch(pointer, num_threads))
        native.library.ds_decoder_run(pointer, scratch.data_ptr(), num_threads)
