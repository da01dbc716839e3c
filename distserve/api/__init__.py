"""The OpenAI-compatible HTTP endpoint and its metrics."""
