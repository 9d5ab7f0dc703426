"""Which addresses are public: requests that a list of URLs asks for must not reach what only this machine can."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215; public by Python before 3.13
_OF_CLOUDS = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Network("168.63.129.16"))
"""where machines of Oracle's and Azure's clouds find what their hosts tell them alone. 192.0.0.0/24 is IANA's for
protocols (RFC 6890); by Python only some of it is private"""


class PrivateAddress(OSError):
    """A connection to an address that is not public was about to be opened."""

    def __init__(self) -> None:
        super().__init__("private address")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not loopback, private, link-local, shared, multicast, …

    IPv6 addresses that stand for an IPv4 address (mapped, 6to4, NAT64) are what that is. ValueError for what is no
    address as the standards write one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _LOCAL_NAT64 or ip.is_site_local:
            return False
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    if any(ip in network for network in _OF_CLOUDS):
        return False
    return ip.is_global and not ip.is_multicast


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an entry of getaddrinfo, for a connection to this very address. PrivateAddress if it is not public.

    Every connection passes here with the address that it is opened to, so neither redirects nor names that resolve to
    another address the second time lead around the check.
    """
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise PrivateAddress
    return socket.socket(family, kind, protocol)
