"""Ranks in processes of their own."""

from pathlib import Path

import pytest

from tests.peers import starting


@pytest.fixture
def start():
    """Starts ``peer.py``."""
    with starting(Path(__file__).with_name("peer.py")) as starter:
        yield starter
