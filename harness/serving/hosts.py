"""Which addresses other machines can reach."""

from __future__ import annotations

from ipaddress import ip_address


def of_this_machine(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
