"""Guest code below the driver: it sends whatever a test writes, and says what came back.

Source of what it may do: AMD 56421 (GHCB 2.0), AMD 56860 (guest messages).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbField, MsrCode, PscMsrRequest, PscOp, valid_mask
from swsnp.abi.snp_message import AUTHTAG_SIZE, HDR_SIZE, PAYLOAD_MAX, MessageHeader, MessageType
from swsnp.crypto.seal import MessageKey, TagMismatch
from swsnp.errors import UsageError
from swsnp.testing.seen import Answer, Replied

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.cpu.builtin import BuiltinProcessor
    from swsnp.guest.boot import BootedGuest

__all__ = ["OUTSIDE", "RawGuest"]

OUTSIDE: Final = 0x7F_FFFF_F000
"""A guest physical address where no memory is, as long as a VM has less than 512 GiB."""

_U64: Final = struct.Struct("<Q")
_REPLY: Final = struct.Struct("<QQ")
_SPARE: Final = 0x80_0000
_UNTOUCHED: Final = b"\xee" * PAGE
_REPORT_REQ: Final = bytes(96)
_EXIT_FIELDS: Final = (GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)


class RawGuest:
    """One vCPU of a booted built-in guest, without the manners of a driver.

    It uses the guest's own pages and VMPCK0. Every method that leaves the guest is a generator, to be used
    with `yield from` inside a program.

    Attributes:
        cpu: the vCPU.
        booted: the guest that runs on it.
        ghcb: address of its GHCB.
        request: address of the request page, shared.
        response: address of the response page, shared.
        data: address of the four shared pages for certificates.
        spare: address from which on nothing is used: private pages that were not validated.
    """

    def __init__(self, cpu: BuiltinProcessor, booted: BootedGuest, vcpu: int = 0) -> None:
        self.cpu, self.booted, self._memory = cpu, booted, cpu.memory
        self.ghcb = booted.layout.ghcb_pages[vcpu]
        self.request, self.response = booted.layout.request_page, booted.layout.response_page
        self.data, self.spare = booted.layout.certs_buffer, _SPARE
        self._slot = booted.secrets.slot(0)
        key = self._slot.key()
        if key is None:
            raise UsageError("hostile guest: VMPCK0 is wiped, wanted a guest that was just booted")
        self._key = MessageKey(key)
        self._sent = (0, 0)

    # memory

    def peek(self, gpa: int, size: int, *, private: bool = False) -> bytes:
        """Copy guest memory out."""
        return self._memory.read(gpa, size, private=private)

    def poke(self, gpa: int, data: bytes, *, private: bool = False) -> None:
        """Copy into guest memory."""
        self._memory.write(gpa, data, private=private)

    def poke_u64(self, gpa: int, value: int) -> None:
        """Store a number into shared memory."""
        self.poke(gpa, _U64.pack(value))

    def hide(self, gpa: int) -> Generator[None, None, int]:
        """Have a page made private by the MSR protocol and accept it; the MSR's reply."""
        reply = yield from self.msr(self._page_state(gpa, PscOp.PRIVATE))
        self._memory.pvalidate(gpa, validate=True)
        return reply

    def share(self, gpa: int) -> Generator[None, None, int]:
        """Have a page made shared by the MSR protocol; the MSR's reply."""
        self._memory.pvalidate(gpa, validate=False)
        return (yield from self.msr(self._page_state(gpa, PscOp.SHARED)))

    @staticmethod
    def _page_state(gpa: int, operation: PscOp) -> int:
        return PscMsrRequest.of(code=MsrCode.PSC_REQ, gfn=gpa // PAGE, operation=operation)

    # messages

    def message(
        self,
        msg_type: int = MessageType.REPORT_REQ,
        payload: bytes = _REPORT_REQ,
        *,
        skip: int = 0,
        **header: Any,
    ) -> bytearray:
        """A sealed request page: the next message of this guest, unless fields say otherwise.

        Nothing is counted: two messages in a row have the same number, which no honest guest may do.

        Args:
            msg_type: message type.
            payload: plaintext.
            skip: how many sequence numbers to leave out.
            header: fields of `MessageHeader` to seal with other values.
        """
        seqno = (self._slot.stored() or 0) + 1 + skip
        plain = MessageHeader(
            msg_seqno=seqno, algo=1, hdr_version=1, hdr_size=HDR_SIZE, msg_type=msg_type, msg_version=1
        )
        self._sent = (seqno, int(msg_type))
        sealed = self._key.seal(plain.but(msg_size=len(payload)).but(**header), payload)
        return bytearray(sealed.ljust(PAGE, b"\0"))

    def send(
        self, page: bytes | bytearray, code: int = ExitCode.GUEST_REQUEST, **fields: int
    ) -> Generator[None, None, Replied]:
        """Put a page into the request page, ask, and judge reply and response page.

        Args:
            page: the request.
            code: plain or extended guest request; the latter offers the data pages unless fields differ.
            fields: as `ask` takes them.
        """
        self.poke(self.request, bytes(page))
        self.poke(self.response, _UNTOUCHED)
        asked: dict[str, Any] = {"info1": self.request, "info2": self.response}
        if code == ExitCode.EXT_GUEST_REQUEST:
            asked |= {"rax": self.data, "rbx": 4}
        self.ask(code, **(asked | fields))
        yield from self.leave()
        return self.seen()

    def payload(self) -> bytes:
        """The plaintext of the firmware's answer in the response page.

        Raises:
            TagMismatch: what is there was not sealed for this guest.
        """
        page = self.peek(self.response, PAGE)
        return self._key.open(page, MessageHeader.parse(page[:HDR_SIZE]).msg_size)

    def answer(self, gpa: int | None = None, *, private: bool = False) -> Answer:
        """Judge a page as the response to the message made last; the response page unless given."""
        page = self.peek(self.response if gpa is None else gpa, PAGE, private=private)
        if page == _UNTOUCHED:
            return Answer.NONE
        header = MessageHeader.parse(page[:HDR_SIZE])
        seqno, msg_type = self._sent
        expected = header.msg_seqno == seqno + 1 and header.msg_type == msg_type + 1
        if not expected or header.msg_size + AUTHTAG_SIZE > PAYLOAD_MAX:
            return Answer.GARBAGE
        try:
            self._key.open(page, header.msg_size)
        except TagMismatch:
            return Answer.GARBAGE
        return Answer.OPENED

    # leaving the guest

    def ask(
        self,
        code: int,
        *,
        info1: int = 0,
        info2: int = 0,
        at: int | None = None,
        usage: int = 0,
        version: int = 2,
        unmarked: tuple[GhcbField, ...] = (),
        **registers: int,
    ) -> None:
        """Fill a GHCB, its own unless `at` says otherwise, and point the MSR at it.

        Args:
            code: SW_EXITCODE.
            info1: SW_EXITINFO1.
            info2: SW_EXITINFO2.
            at: page to use.
            usage: GHCB_USAGE.
            version: PROTOCOL_VERSION.
            unmarked: fields that are written but not marked valid.
            registers: rax, rbx, rcx, rdx, scratch, xcr0.
        """
        gpa = self.ghcb if at is None else at
        values = dict(zip(_EXIT_FIELDS, (code, info1, info2), strict=True))
        for name, value in registers.items():
            values[GhcbField["SW_SCRATCH" if name == "scratch" else name.upper()]] = value
        for field, value in values.items():
            self.poke_u64(gpa + field, value)
        marked = valid_mask(*(each for each in values if each not in unmarked))
        self.poke(gpa + GhcbField.VALID_BITMAP, marked.to_bytes(16, "little"))
        self.poke(gpa + GhcbField.PROTOCOL_VERSION, struct.pack("<HI", version, usage))
        self.cpu.ghcb_msr = gpa

    def leave(self) -> Generator[None, None, None]:
        """VMGEXIT with the MSR as it is."""
        yield

    def msr(self, value: int) -> Generator[None, None, int]:
        """One round of the MSR protocol: what the host left in the MSR."""
        self.cpu.ghcb_msr = int(value)
        yield
        return self.cpu.ghcb_msr

    def seen(self, at: int | None = None) -> Replied:
        """The reply in the GHCB, and the response page."""
        info1, info2 = self.reply(at)
        return Replied(info1=info1, info2=info2, answer=self.answer())

    def reply(self, at: int | None = None) -> tuple[int, int]:
        """SW_EXITINFO1 and SW_EXITINFO2."""
        gpa = self.ghcb if at is None else at
        info1, info2 = _REPLY.unpack(self.peek(gpa + GhcbField.SW_EXIT_INFO_1, 16))
        return info1, info2

    def rbx(self) -> int:
        """RBX of the reply."""
        return int(_U64.unpack(self.peek(self.ghcb + GhcbField.RBX, 8))[0])
