"""KV migration: what to move (pure planning) and the transports that move it."""
