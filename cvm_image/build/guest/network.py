"""The guest's one network interface, configured by ioctl(2), with an address from the host's DHCP server.

The address, like everything about the network, is the host's choice: who is at the other end is shown by TLS and
attestation, never by an address. No name server is asked, and none is configured.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .dhcp import Lease, ask_for_lease

_SIOCADDRT, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8916, 0x891C
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY = 1, 2
_ETHERNET = 1
_ROUTE = "L16s16s16sHhLPhPLLH6x"
"""`struct rtentry` of linux/route.h: destination, gateway, mask, flags; the rest is zero."""


def configure(say: Callable[[str], None]) -> None:
    """Bring the loopback up, and the first Ethernet interface, if there is one, with the address that DHCP gives it."""
    _up("lo")
    interface = first_interface()
    if interface is None:
        say("no network interface")
        return
    _up(interface)
    lease = ask_for_lease(interface, _hardware_address(interface))
    _set_address(interface, lease)
    say(f"address {lease.address}/{lease.network.prefixlen}")


def first_interface() -> str | None:
    """The name of the first Ethernet interface, or None."""
    for path in sorted(Path("/sys/class/net").iterdir()):
        if path.name != "lo" and int((path / "type").read_text()) == _ETHERNET:
            return path.name
    return None


def _hardware_address(interface: str) -> bytes:
    return bytes.fromhex((Path("/sys/class/net") / interface / "address").read_text().strip().replace(":", ""))


def _up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh22x", interface.encode(), 0)
        flags = struct.unpack("16sh22x", fcntl.ioctl(handle, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh22x", interface.encode(), flags | _IFF_UP))


def _set_address(interface: str, lease: Lease) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for number, address in ((_SIOCSIFADDR, lease.address), (_SIOCSIFNETMASK, lease.network.netmask)):
            fcntl.ioctl(handle, number, struct.pack("16s16s8x", interface.encode(), _sockaddr(address)))
        if lease.gateway is not None:
            everything = IPv4Network("0.0.0.0/0")
            route = struct.pack(
                _ROUTE,
                0,
                _sockaddr(everything.network_address),
                _sockaddr(lease.gateway),
                _sockaddr(everything.netmask),
                _RTF_UP | _RTF_GATEWAY,
                *(0,) * 8,
            )
            fcntl.ioctl(handle, _SIOCADDRT, route)


def _sockaddr(address: IPv4Address) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, address.packed)
