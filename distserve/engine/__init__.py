"""Computation: model definitions with paged attention, KV memory, sampling. Knows nothing of networks, Ray or HTTP."""
