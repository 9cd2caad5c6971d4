"""How a command handler ends early: an exception that `mailbox.py` turns into the status of the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swsnp.abi.record import Record
    from swsnp.abi.snp_command import FirmwareStatus

__all__ = ["FirmwareFault", "require"]


class FirmwareFault(Exception):
    """A check of a command failed. Never leaves the mailbox.

    `buffer` is set by commands that write their own command buffer on failure too.
    """

    def __init__(self, status: FirmwareStatus, buffer: Record | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.buffer = buffer


def require(condition: bool, status: FirmwareStatus) -> None:
    """One numbered check: `FirmwareFault(status)` unless the condition holds."""
    if not condition:
        raise FirmwareFault(status)
