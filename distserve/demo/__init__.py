"""The embedded demo model: where it lies on disk.

Promises a Hugging Face model directory that needs no network: weights, tokenizer and chat template. Importing this
module costs nothing; it must not know torch or transformers. How the model is made is in `distserve.demo.train`.
"""

from pathlib import Path


def model_dir() -> Path:
    """Return the demo model's directory, as `AutoModelForCausalLM.from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "model"
