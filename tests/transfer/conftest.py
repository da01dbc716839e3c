"""Ranks in processes of their own."""

import pytest

from tests.peers import starting
from tests.transfer import peer


@pytest.fixture
def start():
    """Starts a rank as ``peer.py`` has it."""
    with starting(peer.main) as starter:
        yield starter
