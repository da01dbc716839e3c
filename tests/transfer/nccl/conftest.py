"""Ranks in this process, with communicators over sockets in NCCL's place."""

import dataclasses

import pytest

from tests.transfer.nccl.ranks import Rank
from tests.transfer.pools import LAYOUT


@pytest.fixture
def start():
    ranks = []

    def starter(*arguments, **options):
        ranks.append(Rank(*arguments, **options))
        return ranks[-1]

    yield starter
    for rank in ranks:
        rank.close()


@pytest.fixture
def source(start):
    return start(seed=1)


@pytest.fixture
def sink(start, source):
    rank = start(dataclasses.replace(LAYOUT, num_blocks=20))
    rank.transport.connect("source", source.transport.address)
    return rank
