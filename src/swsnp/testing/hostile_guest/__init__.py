"""The catalogue of hostile guests.

Every case stands for one act; `guest_case.play` lets it happen in a VM of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.testing.hostile_guest import (
    addresses,
    ghcb_fields,
    messages,
    msr_protocol,
    page_state,
    private_pages,
    races,
)

if TYPE_CHECKING:
    from swsnp.testing.guest_case import Case

__all__ = ["HOSTILE_GUEST"]

HOSTILE_GUEST: Final[tuple[Case, ...]] = (
    *ghcb_fields.CASES,
    *addresses.CASES,
    *messages.CASES,
    *msr_protocol.CASES,
    *page_state.CASES,
    *private_pages.CASES,
    *races.CASES,
)
"""Every hostile act of a guest that is known, by name."""
