"""Addresses of TCP that nobody outside of this machine can reach."""

import ipaddress

import attrs

LOOPBACK = "127.0.0.1"
PORT_MAX = 65535


@attrs.frozen
class Loopback:
    """A port on a loopback interface."""

    host: str
    """127.0.0.1, ::1 or the like."""

    port: int

    @classmethod
    def parse(cls, text: str) -> "Loopback":
        """Reads ``PORT`` or ``HOST:PORT``; ::1 stands in brackets. Raises ValueError, which says what is wrong."""
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= PORT_MAX):
            raise ValueError(f"has no port from 1 to {PORT_MAX}")
        if not is_loopback(host or LOOPBACK):
            raise ValueError(f"{host} is no address of this machine alone, such as {LOOPBACK}")
        return cls(LOOPBACK if host in ("", "localhost") else host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a host of an address, ::1 in brackets, is this machine's own for itself; names but one are not."""
    if host == "localhost":
        return True
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return False
    return address.is_loopback and (address.version == 6) == (bare != host)
