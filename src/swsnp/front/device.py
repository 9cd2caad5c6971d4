"""What every door needs of the machine behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from swsnp.guest.caller import CallerMemory

__all__ = ["SevGuestDevice"]


class SevGuestDevice(Protocol):
    """`/dev/sev-guest` of one virtual machine. Calls may come from several threads at once."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        """Execute one ioctl of a program.

        Args:
            command: the request, 32 bits; any number.
            argument: the address that the program gave.
            caller: the program's memory; the driver's write-back is done through it.

        Returns:
            0, a positive value or -errno.
        """
        ...
