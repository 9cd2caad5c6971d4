"""A guest on a scripted host: memory, a hypervisor that does as told, a firmware with the keys."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField, MsrCode, valid_mask
from swsnp.abi.sev_guest import SNP_GET_REPORT
from swsnp.abi.snp_message import MessageHeader
from swsnp.crypto.seal import MessageKey, TagMismatch
from swsnp.guest.boot import BootedGuest, GuestLayout, boot
from swsnp.guest.caller import BufferMemory
from swsnp.guest.driver import SevGuestDriver
from swsnp.hardware import GuestAccessFault, NestedPageFault

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from swsnp.guest.cpu import GuestCpu

PAGE = 4096
SIZE = 64 * PAGE
SECRETS = 0x1000
CPUID = 0x2000
GHCBS = (0x3000, 0x4000)
REQUEST = 0x5000
RESPONSE = 0x6000
CERTS = 0x8000
MARK = 0x1122334455667788


class FakeMemory:
    """Guest physical memory over two bytearrays; a page is private until it was converted."""

    def __init__(self) -> None:
        self.private = bytearray(SIZE)
        self.shared = bytearray(b"\xa5" * SIZE)
        self.shared_pages: set[int] = set()
        self.validated: set[int] = set(range(0, SIZE, PAGE))
        self.calls: list[tuple[object, ...]] = []
        self.pvalidate_code = 0
        self.rmpadjust_code = 0

    def _plane(self, gpa: int, size: int, private: bool) -> bytearray:
        for page in range(gpa & -PAGE, gpa + size, PAGE):
            if page >= SIZE or private == (page in self.shared_pages):
                raise GuestAccessFault(NestedPageFault(page, private, False))
        return self.private if private else self.shared

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        return bytes(self._plane(gpa, size, private)[gpa : gpa + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        self._plane(gpa, len(data), private)[gpa : gpa + len(data)] = data

    def pvalidate(self, gpa: int, *, validate: bool) -> tuple[int, bool]:
        self.calls.append(("pvalidate", gpa, validate))
        unchanged = (gpa in self.validated) == validate
        (self.validated.add if validate else self.validated.discard)(gpa)
        return self.pvalidate_code, unchanged

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool) -> int:
        self.calls.append(("rmpadjust", gpa, vmpl, permissions, vmsa))
        return self.rmpadjust_code


class FakeCpu:
    """One vCPU."""

    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory
        self.ghcb_msr = 0


class FakeFirmware:
    """Opens requests in the documented order and answers; the payload is whatever `payload` makes."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = [MessageKey(key) for key in keys]
        self.counters = [0] * len(keys)
        self.seen: list[MessageHeader] = []
        self.plaintexts: list[bytes] = []
        self.payload: Callable[[MessageHeader, bytes], bytes] = self.report_or_key
        self.header_changes: dict[str, Any] = {}

    @staticmethod
    def report_or_key(header: MessageHeader, plaintext: bytes) -> bytes:
        if header.msg_type == 3:
            return bytes(32) + plaintext
        if header.msg_type == 17:
            return bytes(128)
        return struct.pack("<II24x", 0, 0x4A0) + plaintext + bytes(i & 0xFF for i in range(0x4A0 - 96))

    def process(self, page: bytes) -> tuple[int, bytes]:
        """Status, and the response without padding."""
        header = MessageHeader.parse(page[:0x60])
        if header.msg_vmpck > 3 or header.msg_size == 0 or header.msg_size % 16:
            return 0x16, b""
        try:
            plaintext = self.keys[header.msg_vmpck].open(page, header.msg_size)
        except TagMismatch:
            return 0x0B, b""
        if header.msg_seqno != self.counters[header.msg_vmpck] + 1:
            return 0x1D, b""
        if header.msg_version != 1:
            return 0x16, b""
        self.seen.append(header)
        self.plaintexts.append(plaintext)
        self.counters[header.msg_vmpck] += 2
        return 0, self.answer(header, self.payload(header, plaintext), **self.header_changes)

    def answer(
        self, request: MessageHeader, payload: bytes, *, key: int | None = None, **changes: Any
    ) -> bytes:
        """A sealed response; `changes` are made before sealing."""
        header = MessageHeader(
            msg_seqno=request.msg_seqno + 1,
            algo=1,
            hdr_version=1,
            hdr_size=0x60,
            msg_type=request.msg_type + 1,
            msg_version=request.msg_version,
            msg_size=len(payload),
            msg_vmpck=request.msg_vmpck,
        ).but(**changes)
        return self.keys[request.msg_vmpck if key is None else key].seal(header, payload)


@dataclass
class GhcbEvent:
    """What the host found in the GHCB."""

    code: int
    info1: int
    info2: int
    rax: int | None
    rbx: int | None
    scratch: int | None
    version: int
    usage: int


@dataclass
class ScriptedHost:
    """Plays hypervisor and firmware. `plan` holds what to do at the next guest requests; empty: be honest."""

    memory: FakeMemory = field(default_factory=FakeMemory)
    plan: deque[Callable[[GhcbEvent], tuple[int, int]]] = field(default_factory=deque)
    msr_replies: dict[int, int] = field(default_factory=dict)
    certs: bytes = b""
    events: list[GhcbEvent] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    msr_requests: list[int] = field(default_factory=list)
    psc: Callable[[GhcbEvent], tuple[int, int]] | None = None
    psc_entries: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = [bytes(range(32)), bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32]
        self.firmware = FakeFirmware(self.keys)
        self.cpu = FakeCpu(self.memory)
        secrets = self.memory.private
        secrets[SECRETS : SECRETS + 4] = struct.pack("<I", 3)
        secrets[SECRETS + 0x20 : SECRETS + 0xA0] = b"".join(self.keys)
        secrets[CPUID : CPUID + 4] = struct.pack("<I", 1)
        self.layout = GuestLayout(
            secrets_page=SECRETS,
            cpuid_page=CPUID,
            ghcb_pages=GHCBS,
            request_page=REQUEST,
            response_page=RESPONSE,
            certs_buffer=CERTS,
        )

    # running guest code

    def run(self, program: Generator[None, None, Any], cpu: FakeCpu | None = None) -> Any:
        """Run a program to its end."""
        cpu = cpu or self.cpu
        while True:
            try:
                next(program)
            except StopIteration as end:
                return end.value
            self.vmgexit(cpu)

    def boot(self) -> BootedGuest:
        """A booted guest."""
        guest: BootedGuest = self.run(boot(self.cpu, self.layout))
        return guest

    def driver(self, **options: Any) -> SevGuestDriver:
        """A driver on a freshly booted guest; what boot did is forgotten."""
        self.memory.shared_pages.clear()
        driver = SevGuestDriver(self.boot(), **options)
        self.events.clear()
        self.msr_requests.clear()
        return driver

    def ioctl(self, driver: SevGuestDriver, caller: Caller, command: int = SNP_GET_REPORT) -> int:
        """One ioctl on the first vCPU."""
        result: int = self.run(driver.ioctl(self.cpu, command, caller.argument, caller.memory))
        return result

    # secrets page, as a debugger of the guest would see it

    def key(self, vmpck: int = 0) -> bytes:
        at = SECRETS + 0x20 + 32 * vmpck
        return bytes(self.memory.private[at : at + 32])

    def stored(self, vmpck: int = 0) -> int:
        value: int = struct.unpack_from("<I", self.memory.private, SECRETS + 0xA0 + 4 * vmpck)[0]
        return value

    def store(self, value: int, vmpck: int = 0) -> None:
        struct.pack_into("<I", self.memory.private, SECRETS + 0xA0 + 4 * vmpck, value)

    def wiped(self, vmpck: int = 0) -> bool:
        return self.key(vmpck) == bytes(32)

    # what a plan is made of

    def reply(self, info1: int, info2: int) -> None:
        """Next: answer with these values, without asking the firmware."""
        self.plan.append(lambda _: (info1, info2))

    def busy(self, times: int = 1) -> None:
        for _ in range(times):
            self.reply(0, 2 << 32)

    def honest(self) -> None:
        self.plan.append(self._honest)

    def too_small(self, npages: int) -> None:
        """Next: the certificate buffer is too small, whatever it is."""

        def step(event: GhcbEvent) -> tuple[int, int]:
            self._put(GhcbField.RBX, npages)
            return 0, 1 << 32

        self.plan.append(step)

    def tamper(self, change: Callable[[bytearray], object]) -> None:
        """Next: let the firmware answer, then change the response page."""

        def step(event: GhcbEvent) -> tuple[int, int]:
            outcome = self._honest(event)
            page = bytearray(self.memory.shared[RESPONSE : RESPONSE + PAGE])
            change(page)
            self.memory.shared[RESPONSE : RESPONSE + PAGE] = page
            return outcome

        self.plan.append(step)

    def put_response(self, data: bytes) -> None:
        self.memory.shared[RESPONSE : RESPONSE + len(data)] = data

    # the hypervisor

    def vmgexit(self, cpu: FakeCpu) -> None:
        msr = cpu.ghcb_msr
        if msr & 0xFFF:
            self.msr_requests.append(msr)
            cpu.ghcb_msr = self._msr(msr)
            return
        self._ghcb_gpa = msr
        event = self._event(msr)
        self.events.append(event)
        info1, info2 = self._handle(event)
        self._put(GhcbField.SW_EXIT_INFO_1, info1)
        self._put(GhcbField.SW_EXIT_INFO_2, info2)

    def _msr(self, msr: int) -> int:
        code = msr & 0xFFF
        if code in self.msr_replies:
            return self.msr_replies[code]
        if code == MsrCode.SEV_INFO_REQ:
            return 0x0002000133000001
        if code == MsrCode.HV_FEATURES_REQ:
            return 0x3081
        if code == MsrCode.REGISTER_GPA_REQ:
            return msr & ~0xFFF | 0x013
        if code == MsrCode.PSC_REQ:
            self.memory.shared_pages.add(msr & 0xFFFFFFFFFF000)
            return 0x015
        return msr

    def _event(self, gpa: int) -> GhcbEvent:
        page = bytes(self.memory.shared[gpa : gpa + PAGE])
        valid = int.from_bytes(page[0x3F0:0x400], "little")

        def field_of(offset: int) -> int | None:
            value: int = struct.unpack_from("<Q", page, offset)[0]
            return value if valid & valid_mask(offset) else None

        code, info1, info2 = (
            field_of(at)
            for at in (GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)
        )
        assert code is not None
        assert info1 is not None
        assert info2 is not None
        version, usage = struct.unpack_from("<HI", page, 0xFFA)
        rax, rbx, scratch = (field_of(at) for at in (GhcbField.RAX, GhcbField.RBX, GhcbField.SW_SCRATCH))
        return GhcbEvent(code, info1, info2, rax, rbx, scratch, version, usage)

    def _handle(self, event: GhcbEvent) -> tuple[int, int]:
        if event.code == ExitCode.PSC:
            return (self.psc or self._psc)(event)
        if event.code == ExitCode.AP_CREATION:
            return self.plan.popleft()(event) if self.plan else (0, 0)
        self.pages.append(bytes(self.memory.shared[REQUEST : REQUEST + PAGE]))
        return (self.plan.popleft() if self.plan else self._honest)(event)

    def _honest(self, event: GhcbEvent) -> tuple[int, int]:
        if event.code == ExitCode.EXT_GUEST_REQUEST:
            assert event.rbx is not None
            assert event.rax is not None
            wanted = -(-len(self.certs) // PAGE)
            if wanted > event.rbx:
                self._put(GhcbField.RBX, wanted)
                return 0, 1 << 32
            self.memory.shared[event.rax : event.rax + len(self.certs)] = self.certs
        status, response = self.firmware.process(bytes(self.memory.shared[event.info1 : event.info1 + PAGE]))
        self.memory.shared[event.info2 : event.info2 + len(response)] = response
        return 0, status

    def _psc(self, event: GhcbEvent) -> tuple[int, int]:
        assert event.scratch == self._ghcb_gpa + GhcbField.SHARED_BUFFER
        cur, end = struct.unpack_from("<HH", self.memory.shared, event.scratch)
        for index in range(cur, end + 1):
            (entry,) = struct.unpack_from("<Q", self.memory.shared, event.scratch + 8 + 8 * index)
            self.psc_entries.append(entry)
            self.memory.shared_pages.add(entry & 0xFFFFFFFFFF000)
        struct.pack_into("<H", self.memory.shared, event.scratch, end + 1)
        return 0, 0

    def _put(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.memory.shared, self._ghcb_gpa + offset, value)


class Caller:
    """A program with one buffer for each thing that an ioctl names."""

    def __init__(self, *, msg_version: int = 1, certs: int = 0x4000) -> None:
        self.memory = BufferMemory()
        self.req = bytearray(bytes(range(64)) + bytes(48))
        self.resp = bytearray(b"\xee" * 4000)
        self.certs = bytearray(b"\xcc" * max(certs, PAGE))
        self.arg = bytearray(32)
        self.req_data = self.memory.place(self.req)
        self.resp_data = self.memory.place(self.resp)
        self.certs_address = self.memory.place(self.certs)
        self.argument = self.memory.place(self.arg)
        self.set(msg_version=msg_version)
        self.offer(self.certs_address, certs)

    def set(self, *, msg_version: int = 1, req: int | None = None, resp: int | None = None) -> None:
        """Fill the ioctl's structure; padding and exitinfo2 hold marks."""
        self.arg[:] = struct.pack(
            "<B7sQQQ",
            msg_version,
            b"padding",
            self.req_data if req is None else req,
            self.resp_data if resp is None else resp,
            MARK,
        )

    def offer(self, address: int, size: int) -> None:
        """Fill in certs_address and certs_len."""
        struct.pack_into("<QII", self.req, 0x60, address, size, 0x55555555)

    @property
    def exitinfo2(self) -> int:
        value: int = struct.unpack_from("<Q", self.arg, 0x18)[0]
        return value

    @property
    def certs_len(self) -> int:
        value: int = struct.unpack_from("<I", self.req, 0x68)[0]
        return value


class FakeClock:
    """Time moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.share = 1.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.slept.append(seconds)
        self.now += seconds * self.share


@pytest.fixture
def host() -> ScriptedHost:
    """A host that is honest until told otherwise."""
    return ScriptedHost()


@pytest.fixture
def caller() -> Caller:
    """A program that asks for a report, with room for four pages of certificates."""
    return Caller()


@pytest.fixture
def make_caller() -> type[Caller]:
    """For tests that need several programs."""
    return Caller


@pytest.fixture
def clock() -> FakeClock:
    """A clock that nobody has to wait for."""
    return FakeClock()


@pytest.fixture
def second_cpu(host: ScriptedHost) -> GuestCpu:
    """Another vCPU of the same guest."""
    return FakeCpu(host.memory)
