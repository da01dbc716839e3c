"""Computation: a model's weights, its paged KV cache, one forward pass over a batch, and the draw of its tokens.

The engine executes what a scheduler decided (:mod:`distserve.core.commands`) and knows nothing of requests' clients,
other instances, Ray or HTTP. Its two entrances are :class:`distserve.engine.worker.Worker`, which runs a model, and
:func:`distserve.engine.description.describe`, which tells about one without importing what runs it.
"""
