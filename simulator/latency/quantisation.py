"""How wide a quantised model's weights are, by the ``quantization_config`` of its config.json."""

from typing import Any

from distserve.core.errors import UnsupportedModelError

# Bits of a weight where the method itself says so; four bits and the share of a scale of eight for 32 of them in MXFP4.
_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25}


def weight_bits(quantisation: Any, name: str) -> float:
    """Bits of a weight by ``quantization_config``, as transformers knows them; 0 without one.

    Raises UnsupportedModelError for a method whose config does not say.
    """
    if not quantisation:
        return 0.0
    found = _stated(quantisation) if isinstance(quantisation, dict) else None
    if not isinstance(found, int | float) or not 1 <= found <= 16:
        raise UnsupportedModelError(
            f"{name}: its quantization_config does not say how many bits a weight has: give a config with 'bits', or "
            f"with a quant_method among {', '.join(_BITS)}"
        )
    return float(found)


def _stated(quantisation: dict[str, Any]) -> Any:
    groups = quantisation.get("config_groups")
    if isinstance(groups, dict):  # compressed-tensors
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        sizes = [weight.get("num_bits") for weight in weights if isinstance(weight, dict)]
        return max((size for size in sizes if isinstance(size, int)), default=None)
    if quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):  # bitsandbytes
        return 4 if quantisation.get("load_in_4bit") else 8
    return quantisation.get("bits") or quantisation.get("w_bit") or _BITS.get(str(quantisation.get("quant_method")))
