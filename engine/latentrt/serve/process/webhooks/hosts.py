"""Where webhooks may go: to hosts that the operator lists, at addresses that are checked before each connection."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from latentrt.errors import RequestError

PORTS = {"https": 443, "http": 80}
_NAT64, _UNICAST = IPv6Network("64:ff9b::/96"), IPv6Network("2000::/3")  # the latter is all that IANA gives out
_URL = re.compile(r"[!-~]{1,2048}")


class Target(NamedTuple):
    """A URL in parts; `path` has the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


class Hosts:
    """The operator's lists: HOST, HOST:PORT or either with a scheme, which is https where none is named.

    Args:
        public: hosts whose addresses must all be of the open Internet.
        private: hosts with other addresses.
    """

    def __init__(self, public: Sequence[str], private: Sequence[str]) -> None:
        self._private = {_origin(each) for each in private}
        self._all = self._private | {_origin(each) for each in public}

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def has_https(self) -> bool:
        """Whether any of them is reached by TLS."""
        return any(target.scheme == "https" for target in self._all)

    def target(self, url: str) -> Target:
        """Return where a URL leads.

        Raises:
            RequestError: to no listed host, or it is no URL.
        """
        needed = "a URL of a host that the operator lists" if self else "no webhook: this server sends none"
        try:
            target = _parsed(url)
        except ValueError as error:
            raise RequestError(f"webhook_url cannot be read ({error})", needed) from error
        if target._replace(path="") not in self._all:
            found = f"webhook_url is of {target.scheme}://{target.authority}"
            raise RequestError(found, needed, fix="ask the operator for --webhook-host")
        return target

    async def addresses(self, target: Target) -> list[str]:
        """Return the addresses of a host, looked up now: connect to these, and look up nothing again.

        Raises:
            OSError: it has none, or one that it may not have.
        """
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if target._replace(path="") not in self._private and not all(map(is_public, addresses)):
            raise PermissionError(f"{target.host} has an address that is not public; see --webhook-private-host")
        return addresses


def is_public(text: str) -> bool:
    """Return whether an address is one of the open Internet, also where another one is written inside it."""
    address = ip_address(text)
    inner = _inside(address)
    if isinstance(address, IPv6Address) and not inner and address not in _UNICAST:
        return False  # also what this Python does not know as private: site-local, a network's own NAT64
    return all(each.is_global and not each.is_multicast for each in (address, *inner))


def _inside(address: IPv4Address | IPv6Address) -> list[IPv4Address]:
    """Return the IPv4 addresses to which an IPv6 address may lead."""
    if isinstance(address, IPv4Address):
        return []
    translated = IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
    return [each for each in (address.ipv4_mapped, address.sixtofour, translated) if each is not None]


def _origin(entry: str) -> Target:
    return _parsed(entry if "://" in entry else f"https://{entry}")._replace(path="")


def _parsed(url: str) -> Target:
    if not _URL.fullmatch(url) or "\\" in url:
        raise ValueError("letters that a URL has not")
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname
    if scheme not in PORTS or not host or "@" in parts.netloc or parts.fragment:
        raise ValueError("it is not https://HOST/PATH")
    path = parts.path or "/"
    return Target(scheme, host, parts.port or PORTS[scheme], f"{path}?{parts.query}" if parts.query else path)
