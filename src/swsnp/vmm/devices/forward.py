"""A port of the host's that leads into a guest."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Forward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A port of this host that leads to one of the guest's.

    `protocol` is tcp or udp, `host` an address, "" for all.
    """

    protocol: str
    host: str
    host_port: int
    guest_port: int
