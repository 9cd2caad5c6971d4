"""A rig that drives a mailbox directly: memory, RMP and command buffers, no hypervisor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pytest

from swsnp.abi.snp_command import (
    Activate,
    Command,
    FirmwareStatus,
    GctxAddress,
    GuestRequest,
    InitEx,
    InitExFlags,
    LaunchFinish,
    LaunchFinishFlags,
    LaunchStart,
    LaunchStartFlags,
    LaunchUpdate,
    LaunchUpdateInfo,
    PageType,
)
from swsnp.abi.snp_launch import SecretsPage
from swsnp.abi.snp_message import MessageHeader, MessageType
from swsnp.abi.snp_report import GuestPolicy, Product
from swsnp.crypto.derive import SeededEntropy
from swsnp.crypto.ecdsa import SigningKey
from swsnp.crypto.seal import MessageKey
from swsnp.firmware.chip import Chip, ChipSettings, preset
from swsnp.firmware.mailbox import Mailbox
from swsnp.hardware.memory import SystemMemory
from swsnp.hardware.rmp import PageState, Rmp, RmpEntry
from swsnp.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record
    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

POLICY = GuestPolicy.of(smt=1, reserved_one=1)
FIRMWARE_PAGE = RmpEntry(assigned=True, immutable=True)


@dataclass
class Answer:
    """How a guest message ended: `header` and `payload` only after SUCCESS."""

    status: int
    page: bytes
    header: MessageHeader = field(default_factory=MessageHeader)
    payload: bytes = b""


@dataclass
class RigGuest:
    """A guest as the rig knows it: the page of its context, its keys from the secrets page."""

    gctx: int
    asid: int
    keys: list[MessageKey]
    seqno: list[int] = field(default_factory=lambda: [1, 1, 1, 1])


class Rig:
    """A chip on a memory; `init=False` leaves SNP uninitialised."""

    def __init__(
        self,
        *,
        product: Product = Product.GENOA,
        settings: ChipSettings | None = None,
        init: bool = True,
        seed: bytes = b"rig",
        **changes: Any,
    ) -> None:
        self.chip = Chip(
            product=product,
            secret=bytes(range(32)),
            settings=replace(settings or preset(product), **changes),
            entropy=SeededEntropy(seed),
            deterministic=True,
        )
        self.memory, self.rmp, self.trace = SystemMemory(), Rmp(), Trace()
        self.slept: list[float] = []
        self.mailbox = Mailbox(
            self.chip, memory=self.memory, rmp=self.rmp, trace=self.trace, sleep=self.slept.append
        )
        self.buffer = self.memory.allocate_page()
        if init:
            assert self.init() == 0
            assert self.command(Command.SNP_DF_FLUSH) == 0

    @property
    def platform(self) -> Platform:
        return self.mailbox.platform

    def init(self, **flags: int) -> int:
        return self.command(
            Command.SNP_INIT_EX, InitEx(flags=InitExFlags.of(**({"init_rmp": 1} | flags)))
        )  # fmt: skip

    def command(self, command: int, record: Record | None = None) -> int:
        if record is not None:
            self.memory.write(self.buffer, bytes(record))
        return self.mailbox.command(command, self.buffer)

    def page(self, entry: RmpEntry = FIRMWARE_PAGE, data: bytes = b"") -> int:
        """A page in some state; Firmware unless told otherwise."""
        address = self.memory.allocate_page()
        self.memory.write(address, data)
        self.rmp[address] = entry
        return address

    def guest_page(self, asid: int, gpa: int, data: bytes = b"", **changes: Any) -> int:
        """A Pre-Guest page."""
        return self.page(RmpEntry(assigned=True, immutable=True, asid=asid, gpa=gpa, **changes), data)

    def create(self) -> int:
        gctx = self.page()
        assert self.command(Command.SNP_GCTX_CREATE, GctxAddress(gctx_paddr=gctx)) == 0
        return gctx

    def start(self, gctx: int, *, policy: int = POLICY, **fields: Any) -> int:
        flags = LaunchStartFlags(fields.pop("flags", 0))
        return self.command(
            Command.SNP_LAUNCH_START,
            LaunchStart(gctx_paddr=gctx, policy=GuestPolicy(policy), flags=flags, **fields),
        )

    def activate(self, gctx: int, asid: int) -> int:
        return self.command(Command.SNP_ACTIVATE, Activate(gctx_paddr=gctx, asid=asid))

    def update(self, gctx: int, page: int, page_type: int = PageType.NORMAL, **fields: Any) -> int:
        info = LaunchUpdateInfo.of(page_type=page_type, **fields.pop("info", {}))
        return self.command(
            Command.SNP_LAUNCH_UPDATE, LaunchUpdate(gctx_paddr=gctx, info=info, page_paddr=page, **fields)
        )

    def finish(self, gctx: int, **fields: Any) -> int:
        flags = LaunchFinishFlags(fields.pop("flags", 0))
        return self.command(
            Command.SNP_LAUNCH_FINISH, LaunchFinish(gctx_paddr=gctx, flags=flags, **fields)
        )  # fmt: skip

    def launching(self, asid: int = 1, *, policy: int = POLICY, **fields: Any) -> int:
        """A guest in LAUNCH with an ASID; returns its gctx address."""
        gctx = self.create()
        assert self.start(gctx, policy=policy, **fields) == 0
        assert self.activate(gctx, asid) == 0
        return gctx

    def running(self, asid: int = 1, *, policy: int = POLICY, **finish: Any) -> RigGuest:
        """A launched guest: one normal page, a secrets page, LAUNCH_FINISH."""
        gctx = self.launching(asid, policy=policy)
        code = self.guest_page(asid, 0x1000, b"code")
        secrets = self.guest_page(asid, 0x2000)
        assert self.update(gctx, code) == 0
        assert self.update(gctx, secrets, PageType.SECRETS) == 0
        assert self.finish(gctx, **finish) == 0
        page = SecretsPage.parse(self.memory.read(secrets, 4096))
        keys = [MessageKey(key) for key in (page.vmpck0, page.vmpck1, page.vmpck2, page.vmpck3)]
        return RigGuest(gctx, asid, keys)

    def context(self, guest: RigGuest | int) -> GuestContext:
        return self.platform.guests[guest if isinstance(guest, int) else guest.gctx]

    def request(
        self,
        guest: RigGuest,
        payload: bytes,
        msg_type: int = MessageType.REPORT_REQ,
        *,
        vmpck: int = 0,
        **header: Any,
    ) -> Answer:
        """Send one message and open the answer; `header` replaces fields of the header."""
        fields: dict[str, Any] = {
            "msg_seqno": guest.seqno[vmpck],
            "algo": 1,
            "hdr_version": 1,
            "hdr_size": 0x60,
            "msg_type": msg_type,
            "msg_version": 1,
            "msg_size": len(payload),
            "msg_vmpck": vmpck,
        }
        sealed = guest.keys[vmpck].seal(MessageHeader(**(fields | header)), payload)
        request = self.page(RmpEntry(), sealed)
        response = self.page()
        buffer = GuestRequest(gctx_paddr=guest.gctx, request_paddr=request, response_paddr=response)
        status = self.command(Command.SNP_GUEST_REQUEST, buffer)
        page = self.memory.read(response, 4096)
        self.rmp[response] = RmpEntry()
        if status != FirmwareStatus.SUCCESS:
            return Answer(status, page)
        answer = MessageHeader.parse(page[:0x60])
        guest.seqno[vmpck] += 2
        return Answer(status, page, answer, guest.keys[vmpck].open(page, answer.msg_size))

    def state(self, page: int) -> PageState:
        return self.rmp.state(page)


class MakeRig(Protocol):
    """`make_rig(product=…, settings=…, init=…, **changes of the settings)`."""

    def __call__(self, **arguments: Any) -> Rig: ...


@pytest.fixture(scope="session")
def make_rig() -> MakeRig:
    """Builds rigs."""
    return Rig


@pytest.fixture
def rig() -> Rig:
    """A Genoa part, SNP initialised, ASIDs clean."""
    return Rig()


Arm: TypeAlias = "Callable[[Callable[[], object]], list[bytes]]"


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Arm:
    """Have something happen during the next signature; returns what was signed, in order."""
    genuine = SigningKey.sign

    def arm(happens: Callable[[], object]) -> list[bytes]:
        signed: list[bytes] = []

        def sign(key: SigningKey, data: bytes) -> bytes:
            signed.append(data)
            if len(signed) == 1:
                happens()
            return genuine(key, data)

        monkeypatch.setattr(SigningKey, "sign", sign)
        return signed

    return arm
