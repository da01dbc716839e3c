"""The address at which a host listens on a network that the user named."""

import ipaddress
import socket

import psutil

from distserve.core.errors import ConfigError

_IP = (socket.AF_INET, socket.AF_INET6)


def address_on(interface: str) -> str:
    """The address of this host on ``interface``: a network interface (``eth1``) or a network (``10.1.0.0/16``).

    A network is the way to say it for hosts whose interfaces have different names; an address is a network of one.
    IPv4 comes before IPv6, addresses that hold on one link only (``fe80::``) do not count.

    Raises:
        ConfigError: this host has no such interface, it is down or without an address; says what there is.
    """
    found = _addresses()
    try:
        network = ipaddress.ip_network(interface, strict=False)
    except ValueError:
        return _of_interface(interface, found)
    within = [address for addresses in found.values() for address in addresses if address in network]
    if not within:
        raise ConfigError(f"no address of {socket.gethostname()} is in the network {interface}: it has {_shown(found)}")
    return str(within[0])


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _of_interface(interface: str, found: dict[str, list[_Address]]) -> str:
    host = socket.gethostname()
    if interface not in found:
        raise ConfigError(f"{host} has no network interface {interface}: it has {_shown(found)}")
    if not psutil.net_if_stats()[interface].isup:
        raise ConfigError(f"the network interface {interface} of {host} is down")
    if not found[interface]:
        raise ConfigError(f"the network interface {interface} of {host} has no address: it has {_shown(found)}")
    return str(found[interface][0])


def _addresses() -> dict[str, list[_Address]]:
    """The usable addresses of each interface."""
    found: dict[str, list[_Address]] = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses = [ipaddress.ip_address(e.address.partition("%")[0]) for e in entries if e.family in _IP]
        usable = [address for address in addresses if not address.is_link_local]
        found[name] = sorted(usable, key=lambda address: address.version)
    return found


def _shown(found: dict[str, list[_Address]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, addresses)) or 'no address'})" for name, addresses in found.items())
