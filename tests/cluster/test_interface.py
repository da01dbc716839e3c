"""A network that the user names becomes this host's address on it, or a sentence of what there is."""

import pytest

from distserve.cluster.interface import address_on
from distserve.core.errors import ConfigError


@pytest.mark.parametrize("interface", ["lo", "127.0.0.0/8", "127.0.0.1", "127.0.0.1/8"])
def test_loopback_by_its_name_or_network(interface: str) -> None:
    assert address_on(interface) == "127.0.0.1"


@pytest.mark.parametrize(
    ("interface", "expected"),
    [
        ("nope0", "has no network interface nope0: it has .*lo \\(127.0.0.1"),
        ("203.0.113.0/24", "no address of .* is in the network 203.0.113.0/24: it has .*lo \\(127.0.0.1"),
        ("2001:db8::/32", "no address of .* is in the network 2001:db8::/32"),
        ("300.1.2.3", "has no network interface 300.1.2.3"),
    ],
)
def test_what_is_not_there_is_named_beside_what_is(interface: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        address_on(interface)
