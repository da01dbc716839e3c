"""Disaggregated serving of large language models: prefill and decode on separate instances."""

__version__ = "0.1.0"
