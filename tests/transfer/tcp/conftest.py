"""Both ends of KV over TCP in this process, or one of them and a source that does as it is told."""

import pytest

from tests.transfer.tcp.ends import BIG, Fake, make


@pytest.fixture
def sink():
    transport = make()
    yield transport
    transport.close()


@pytest.fixture
def big_sink():
    transport = make(BIG)
    yield transport
    transport.close()


@pytest.fixture
def fake():
    fakes = []

    def starter(*arguments, **options):
        fakes.append(Fake(*arguments, **options))
        return fakes[-1]

    yield starter
    for started in fakes:
        started.close()
