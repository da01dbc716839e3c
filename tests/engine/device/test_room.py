"""A card that is too small is told from what is free on it, before anything is brought there."""

import pytest
import torch

from distserve.core.errors import ConfigError
from distserve.engine.device.room import check_room

MIB = 2**20
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 1000 MiB, of which 300 are free and 50 more are kept by torch for later."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 * MIB, 1000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * MIB)


def test_what_fits_is_let_through() -> None:
    check_room(200 * MIB, 150 * MIB, CARD)
    check_room(2**60, 2**60, torch.device("cpu"))


def test_the_error_says_how_much_is_missing() -> None:
    with pytest.raises(ConfigError) as caught:
        check_room(300 * MIB - 5, 120 * MIB, CARD)
    message = str(caught.value)
    for part in ("cuda:0", "weights need 300 MiB", "KV 120 MiB", "of 1,000 MiB 350 MiB are free", "70 MiB are missing"):
        assert part in message
