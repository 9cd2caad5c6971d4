"""What hostile hosts do: each class is one behaviour, to be combined with any guest."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbField, MsrCode, VmmError
from swsnp.testing.hostile_host.interposer import Attack, Departure

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BUSY",
    "Busy",
    "BusyAfterDelivery",
    "ChangeRequest",
    "ChangeResponse",
    "Certificates",
    "DeliverTwice",
    "Flicker",
    "INVALID_LEN",
    "LyingMsr",
    "PageStateHeader",
    "Record",
    "ReplayRequest",
    "ReplayResponse",
    "Reply",
    "Stall",
    "TooSmall",
]

BUSY: Final = VmmError.BUSY << 32
INVALID_LEN: Final = VmmError.INVALID_LEN << 32
_JUNK: Final = b"\xa5" * PAGE


class Record(Attack):
    """Honest, but it keeps every request and response page that went by."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.responses: list[bytes] = []

    def back(self, departure: Departure) -> bool:
        """Keep both pages."""
        if departure.is_guest_request:
            self.requests.append(departure.read(departure.info1, PAGE))
            self.responses.append(departure.read(departure.info2, PAGE))
        return False


class ChangeResponse(Attack):
    """The firmware's answer is another one when the guest gets it."""

    def __init__(self, change: Callable[[bytes], bytes]) -> None:
        self._change = change

    def back(self, departure: Departure) -> bool:
        """Change the response page."""
        if departure.is_guest_request:
            page = departure.read(departure.info2, PAGE)
            departure.write(departure.info2, self._change(page).ljust(PAGE, b"\0")[:PAGE])
        return False


class ReplayResponse(Attack):
    """The first answer is given to every later request as well, once more and for ever."""

    def __init__(self, first: bytes | None = None) -> None:
        self._first = first

    def back(self, departure: Departure) -> bool:
        """Remember the first response, put it in place of the others."""
        if departure.is_guest_request:
            if self._first is None:
                self._first = departure.read(departure.info2, PAGE)
            departure.write(departure.info2, self._first)
        return False


class ChangeRequest(Attack):
    """The guest's message is another one when the firmware gets it."""

    def __init__(self, change: Callable[[bytes], bytes]) -> None:
        self._change = change

    def left(self, departure: Departure) -> bool:
        """Change the request page."""
        if departure.is_guest_request:
            departure.write(departure.info1, self._change(departure.read(departure.info1, PAGE)))
        return False


class ReplayRequest(ChangeRequest):
    """An earlier message goes to the firmware in place of the new one."""

    def __init__(self, earlier: bytes) -> None:
        super().__init__(lambda _: earlier)


class DeliverTwice(Attack):
    """The firmware gets the message twice; the guest is told of the first time only."""

    def __init__(self) -> None:
        self._saved: tuple[bytes, bytes] | None = None

    def left(self, departure: Departure) -> bool:
        """Keep the request."""
        self._saved = departure.save() if departure.is_guest_request else None
        return False

    def back(self, departure: Departure) -> bool:
        """Ask KVM again, then hide its second reply."""
        if not departure.is_guest_request:
            return False
        if self._saved is not None:
            departure.restore(self._saved)
            self._saved = None
            return True
        departure.reply(0, 0)
        return False


class Reply(Attack):
    """Words of the host's own choice in the reply to a guest request.

    Args:
        info1: SW_EXITINFO1.
        info2: SW_EXITINFO2.
        rbx: RBX; None: what is there.
        delivered: whether the firmware gets the message before the host lies about it.
        times: how often; None: always.
    """

    def __init__(
        self,
        info1: int,
        info2: int,
        *,
        rbx: int | None = None,
        delivered: bool = False,
        times: int | None = None,
    ) -> None:
        self._words, self._rbx = (info1, info2), rbx
        self._delivered, self._left = delivered, times

    def left(self, departure: Departure) -> bool:
        """Reply without asking KVM, unless the message shall be delivered."""
        if self._delivered or not departure.is_guest_request or self._left == 0:
            return False
        self._lie(departure)
        return True

    def back(self, departure: Departure) -> bool:
        """Put other words over KVM's reply."""
        if self._delivered and departure.is_guest_request and self._left != 0:
            self._lie(departure)
        return False

    def _lie(self, departure: Departure) -> None:
        if self._left is not None:
            self._left -= 1
        departure.reply(*self._words, rbx=self._rbx)


class Busy(Reply):
    """Every guest request is put off, `times` times or for ever."""

    def __init__(self, times: int | None = None) -> None:
        super().__init__(0, BUSY, times=times)


class BusyAfterDelivery(Reply):
    """The firmware has answered, and the guest is told to come back with the same message."""

    def __init__(self) -> None:
        super().__init__(0, BUSY, delivered=True, times=1)


class TooSmall(Attack):
    """An extended guest request is answered "buffer too small", with any number of pages in RBX.

    Args:
        npages: RBX.
        fallback: what then becomes of the same message as a plain guest request; None: it is served.
    """

    def __init__(self, npages: int, fallback: Attack | None = None) -> None:
        self._npages, self._fallback = npages, fallback or Attack()

    def left(self, departure: Departure) -> bool:
        """Refuse the extended form, pass the plain one on."""
        if not departure.is_extended:
            return self._fallback.left(departure)
        departure.reply(0, INVALID_LEN, rbx=self._npages)
        return True

    def back(self, departure: Departure) -> bool:
        """Pass on."""
        return self._fallback.back(departure)


class Certificates(Attack):
    """Other certificates than the VMM's, in the guest's buffer.

    Args:
        data: what the buffer then begins with.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._buffer = 0

    def left(self, departure: Departure) -> bool:
        """Note where the buffer is."""
        self._buffer = departure.read_u64(departure.msr + GhcbField.RAX) if departure.is_extended else 0
        return False

    def back(self, departure: Departure) -> bool:
        """Write over the buffer."""
        if self._buffer:
            departure.write(self._buffer, self._data)
        return False


class Flicker(Attack):
    """Shared memory changes as soon as the guest has read it: whoever reads twice is fooled."""

    def fetched(self, departure: Departure, gpa: int, size: int) -> None:
        """Ruin what was read: the response page, or the reply in the GHCB."""
        if departure.is_guest_request:
            departure.write(gpa, _JUNK[:size])


class LyingMsr(Attack):
    """A request of the MSR protocol gets an answer of the host's own choice.

    Args:
        request: which request.
        reply: the MSR's value.
    """

    def __init__(self, request: MsrCode, reply: int) -> None:
        self._request, self._reply = request, reply

    def left(self, departure: Departure) -> bool:
        """Answer without asking KVM."""
        if departure.msr_request != self._request:
            return False
        departure.reply_msr(self._reply)
        return True


class Stall(Attack):
    """Page state changes through the GHCB succeed and never get anywhere."""

    def left(self, departure: Departure) -> bool:
        """Say success; the list stays as it is."""
        if departure.code != ExitCode.PSC:
            return False
        departure.reply(0, 0)
        return True


class PageStateHeader(Attack):
    """The list of a page state change comes back with other numbers, success or not.

    Args:
        headers: (cur_entry, end_entry, reserved) for one request after the other; the last one for the rest.
        info1: SW_EXITINFO1.
        info2: SW_EXITINFO2.
    """

    def __init__(self, *headers: tuple[int, int, int], info1: int = 0, info2: int = 0) -> None:
        self._headers, self._words = list(headers), (info1, info2)

    def left(self, departure: Departure) -> bool:
        """Answer without asking KVM."""
        if departure.code != ExitCode.PSC:
            return False
        header = self._headers.pop(0) if len(self._headers) > 1 else self._headers[0]
        departure.write(departure.msr + GhcbField.SHARED_BUFFER, struct.pack("<HHI", *header))
        departure.reply(*self._words)
        return True
