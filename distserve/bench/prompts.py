"""The prompts: random tokens of an exact length, or text for servers that take no token ids.

Prompt ``index`` depends on the seed and the index alone, not on the order in which prompts are made. No two requests
share a prefix by accident, so that a server's prefix cache neither helps nor hurts, unless the trace says they do.
"""

from dataclasses import dataclass

import numpy as np

from distserve.bench.traces import MOONCAKE_BLOCK_TOKENS

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class TokenPrompts:
    """Random token ids in ``[0, vocab_size)``.

    ``prefix_blocks``: per request the identities of its blocks of ``block_tokens`` tokens (fractional when lengths are
    scaled): equal identities at the same place give equal tokens.
    """

    vocab_size: int
    seed: int
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    block_tokens: float = MOONCAKE_BLOCK_TOKENS

    def make(self, index: int, num_tokens: int) -> list[int]:
        """``num_tokens`` ids."""
        if self.prefix_blocks is None or index >= len(self.prefix_blocks):
            return self._draw((0, index), num_tokens)
        ids: list[int] = []
        for place, block in enumerate(self.prefix_blocks[index]):
            size = int((place + 1) * self.block_tokens) - int(place * self.block_tokens)
            ids += self._draw((1, block), min(size, num_tokens - len(ids)))
        return ids + self._draw((0, index), num_tokens - len(ids))

    def _draw(self, stream: tuple[int, int], num: int) -> list[int]:
        rng = np.random.default_rng((self.seed, *stream))
        ids: list[int] = rng.integers(0, self.vocab_size, num).tolist()
        return ids


@dataclass(frozen=True)
class TextPrompts:
    """Single letters with spaces between: about one token each with most tokenizers.

    ``tokens_per_word`` and ``overhead_tokens`` (start token, chat template) are measured on the server beforehand, so
    that lengths are close; the report has the lengths that the server counted.
    """

    seed: int
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def make(self, index: int, num_tokens: int) -> str:
        """A text of about ``num_tokens`` tokens, the server's additions counted in."""
        num_words = max(1, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))
        rng = np.random.default_rng((self.seed, 0, index))
        return " ".join(_LETTERS[rng.integers(0, len(_LETTERS), num_words)])
