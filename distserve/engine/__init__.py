"""Computation: a model's weights, its paged KV cache, one forward pass over a batch, and the draw of its tokens.

The engine executes what a scheduler decided (:mod:`distserve.core.commands`) and knows nothing of requests' clients,
other instances, Ray or HTTP.
"""

from distserve.engine.description import ModelDescription, describe
from distserve.engine.worker import Worker

__all__ = ["ModelDescription", "Worker", "describe"]
