"""Training batches for the demo model: documents drawn from the corpus and packed into rows of tokens.

Promises an endless, seeded sequence of batches: the same corpus, tokenizer and seed give the same batches. A row holds
whole documents one after the other, as a served prompt holds one. Must not know the model or the optimiser.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from distserve.demo.corpus import Corpus
from distserve.demo.tokenizer import SPECIAL_TOKENS, render

IGNORED = -100  # the label transformers leaves out of the loss
TEXT_SHARE = 0.08  # of the documents; the others are conversations
MAX_TEXT_SHARE_OF_ROW = 0.75
POOL_SIZE = 64  # documents to choose from when a row is filled


class BatchSampler:
    """Draws batches of packed rows.

    Labels cover what the model is to say: the assistant's turns with their ends, and plain texts. Questions are read,
    not learnt. All randomness comes from `seed`.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._assistant = SPECIAL_TOKENS.index("<|assistant|>")
        self._texts = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in corpus.texts]
        self._text_weights = [len(text) for text in self._texts]
        self._pools: dict[int, list[tuple[list[int], list[int]]]] = {}

    def batch(self, num_rows: int, row_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (input ids, labels), both int64 of shape (num_rows, row_length), padded at the right."""
        rows = [self._row(row_length) for _ in range(num_rows)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])

    def _row(self, length: int) -> tuple[list[int], list[int]]:
        pool = self._pools.setdefault(length, [])
        ids: list[int] = []
        labels: list[int] = []
        while True:
            while len(pool) < POOL_SIZE:
                pool.append(self._document(length))
            # The oldest document opens the row, so none waits for ever; then the longest that fits.
            fitting = [index for index, (document, _) in enumerate(pool) if len(ids) + len(document) <= length]
            if not fitting:
                break
            chosen = max(fitting, key=lambda index: len(pool[index][0])) if ids else 0
            document, document_labels = pool.pop(chosen)
            ids += document
            labels += document_labels
        padding = length - len(ids)
        return ids + [self._tokenizer.pad_token_id] * padding, labels + [IGNORED] * padding

    def _document(self, max_length: int) -> tuple[list[int], list[int]]:
        """Draw a document of at most `max_length` tokens: a conversation or a piece of text."""
        if self._rng.random() < TEXT_SHARE:
            text = self._rng.choices(self._texts, weights=self._text_weights)[0]
            size = int(max_length * MAX_TEXT_SHARE_OF_ROW)
            start = self._rng.randrange(max(1, len(text) - size // 2)) if len(text) > size else 0
            piece = text[start : start + size]
            ids = [
                self._tokenizer.bos_token_id,
                *piece,
                *([self._tokenizer.eos_token_id] if start + size >= len(text) else []),
            ]
            return ids, list(ids)
        rendered = render(self._tokenizer, self._corpus.conversation(self._rng))
        ids = self._tokenizer.encode(rendered, add_special_tokens=False)[:max_length]
        return ids, list(assistant_labels(ids, self._assistant, self._tokenizer.eos_token_id))


def assistant_labels(ids: Sequence[int], assistant_id: int, end_id: int) -> Iterator[int]:
    """Yield a label per token: itself inside the assistant's turns, their end included, else `IGNORED`."""
    speaking = False
    for token_id in ids:
        yield token_id if speaking else IGNORED
        if token_id == assistant_id:
            speaking = True
        elif token_id == end_id:
            speaking = False
