"""The network interface that leads to the first node, as lines that export it.

``python -m mm.launch.interface ADDRESS``: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, unless set.
Without them gloo takes the address that the host's own name has: on Debian 127.0.1.1, which no
other node reaches.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import MutableMapping

_SIOCGIFADDR = 0x8915
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def local_address(towards: str) -> str:
    """Address of this machine from which ``towards`` is reached (IPv4). Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # a datagram socket sends nothing here
        return probe.getsockname()[0]


def addresses() -> dict[str, str]:
    """Interfaces of this machine that are up: name -> IPv4 address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # it has no address
    return found


def interface(towards: str) -> str | None:
    """Name of the interface that leads to ``towards``; None when no name has its address."""
    address = local_address(towards)
    return next((name for name, own in addresses().items() if own == address), None)


def set_interface(environ: MutableMapping[str, str]) -> None:
    """Set the interface for a rank of several nodes, unless it is set or is a loopback.

    A loopback is what the first node's own name may be to itself: no other node reaches it.
    """
    count = lambda name: int(environ.get(name) or 1)
    here = count("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else count("WORLD_SIZE")
    if count("WORLD_SIZE") == here or "MASTER_ADDR" not in environ:
        return
    try:
        towards = socket.gethostbyname(environ["MASTER_ADDR"])
        found = None if towards.startswith("127.") else interface(towards)
    except OSError:
        return  # the rendezvous itself will tell
    if found is not None:
        for name in NAMES:
            environ.setdefault(name, found)


def main(towards: str) -> int:
    """Print the exports. Returns an exit code."""
    try:
        towards = socket.gethostbyname(towards)
        found = interface(towards)
    except OSError as error:
        host = socket.gethostname()
        sys.stderr.write(f"mm: {host}: no way to the first node, {towards}: {error}\n")
        return 2
    for name in NAMES:
        if found and name not in os.environ:
            sys.stdout.write(f"export {name}={found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
