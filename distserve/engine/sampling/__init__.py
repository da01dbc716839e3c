"""From logits to tokens, vectorised over a batch of requests that may each want something else.

Names and semantics are vLLM's. Every row's result depends on that row alone: on its logits, its request, the
tokens of its sequence and the random numbers of (seed, choice, index), never on what else is in the batch.
"""

from distserve.engine.sampling.logprobs import token_logprobs
from distserve.engine.sampling.sampler import Draw, Sampler, SamplingRow

__all__ = ["Draw", "Sampler", "SamplingRow", "token_logprobs"]
