"""What a program in the guest gets back, as Python values."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swsnp.errors import SwsnpError

if TYPE_CHECKING:
    from swsnp.vmm.stop import StopReason

__all__ = ["Answer", "ExtendedReport", "GuestMoved", "GuestStopped", "IoctlFailed"]


class GuestStopped(SwsnpError):
    """The guest or its VM ended while a program waited; `reason` is the run loop's."""

    def __init__(self, name: str, reason: StopReason) -> None:
        super().__init__(f"{name}: the guest stopped: {reason}")
        self.reason = reason


class GuestMoved(SwsnpError):
    """The guest was saved before the request was begun, and answers it where it goes on."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: the guest was saved and left this machine; ask it where it was restored")


class IoctlFailed(SwsnpError):
    """The guest driver refused: `errno` positive, `exitinfo2` as the program would have seen it."""

    def __init__(self, result: int, exitinfo2: int) -> None:
        name = errno.errorcode.get(-result, str(result))
        super().__init__(f"ioctl: {name}, exitinfo2 {exitinfo2:#x}")
        self.errno, self.exitinfo2 = -result, exitinfo2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """MSG_REPORT_RSP: `status` 0 and a report of 1,184 bytes, or a status and zeros."""

    status: int
    report: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedReport(Answer):
    """And the buffer that the host put its certificate table into; zeros when there was none."""

    certs: bytes = field(repr=False)
