"""How a layer's weights are split over tensor-parallel shards: the model's own ``tp_plan``, or ours.

A plan names modules (and parameters) of a layer and a style for each; what it does not name is replicated. Ours
stands where transformers has none (OPT, GPT-2) or has one that would replicate the KV heads (Phi-3).

Styles are transformers' (https://huggingface.co/docs/transformers/perf_infer_gpu_multi), with one of our own,
``fused_qkv``: queries, keys and values in one matrix, each split by heads.
"""

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from distserve.core.errors import UnsupportedModelError

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.\*\.(.+)$")

_OURS: Mapping[str, Mapping[str, str]] = {
    "opt": {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.out_proj": "rowwise",
        "fc1": "colwise",
        "fc2": "rowwise",
    },
    "gpt2": {
        "attn.c_attn": "fused_qkv",
        "attn.c_proj": "rowwise",
        "mlp.c_fc": "colwise",
        "mlp.c_proj": "rowwise",
    },
    "phi3": {
        "self_attn.qkv_proj": "fused_qkv",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_up_proj": "packed_colwise",
        "mlp.down_proj": "rowwise",
    },
}
_SPLIT = {"colwise", "rowwise", "packed_colwise", "fused_qkv", "moe_tp_experts"}
_HEAD = "colwise_gather_output"
_REPLICATED = {"replicated_with_grad_allreduce", "replicate", "replicated"}


def layer_plan(module: PreTrainedModel) -> dict[str, str]:
    """Styles by module or parameter name within a layer; replicated ones are left out.

    Raises:
        UnsupportedModelError: there is no plan, or it splits the model in a way that the KV cache could not follow.
    """
    model_type = module.config.model_type
    if model_type in _OURS:
        return dict(_OURS[model_type])
    plan: dict[str, str] = {}
    for pattern, style in (getattr(module, "_tp_plan", None) or {}).items():
        match = _LAYER.search(pattern)
        if match is None or style in _REPLICATED:
            continue
        if style not in _SPLIT:
            raise UnsupportedModelError(
                f"a {model_type} model can be served with tp 1 only: its tensor-parallel plan has {match[1]} {style!r}"
            )
        plan[match[1]] = style
    if not plan:
        raise UnsupportedModelError(
            f"a {model_type} model can be served with tp 1 only: transformers has no tensor-parallel plan for it"
        )
    return plan


def splits_head(module: PreTrainedModel, name: str) -> bool:
    """Whether the head, the module ``name``, may compute a part of the vocabulary's logits on each shard."""
    return module.config.model_type in _OURS or (getattr(module, "_tp_plan", None) or {}).get(name) == _HEAD
