"""Packed training batches: whole documents, labels on what the assistant says, everything from the seed."""

import pytest
import torch
from transformers import AutoTokenizer

from distserve.demo import model_dir
from distserve.demo.batches import IGNORED, BatchSampler, assistant_labels
from distserve.demo.corpus import gather


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def corpus():
    return gather()


def test_labels_cover_the_assistants_turns_and_their_ends():
    assistant, end, user = 5, 2, 4
    ids = [1, user, 10, end, assistant, 11, 12, end, user, 13, end, assistant, 14, end, 15]
    labels = [IGNORED] * 5 + [11, 12, end] + [IGNORED] * 4 + [14, end, IGNORED]
    assert list(assistant_labels(ids, assistant, end)) == labels


@pytest.mark.parametrize("shape", [(4, 256), (1, 2048)])
def test_rows_hold_documents_from_their_beginning(corpus, tokenizer, shape):
    ids, labels = BatchSampler(corpus, tokenizer, seed=0).batch(*shape)
    assert ids.shape == labels.shape == shape
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert ((labels == ids) | (labels == IGNORED)).all()
    padded = ids == tokenizer.pad_token_id
    assert (labels[padded] == IGNORED).all()
    assert padded.float().mean() < 0.1
    assert (labels == tokenizer.eos_token_id).any(dim=1).all()


def test_batches_depend_on_the_seed_alone(corpus, tokenizer):
    first, again, other = (BatchSampler(corpus, tokenizer, seed=seed).batch(2, 256)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
