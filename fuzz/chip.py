"""A mailbox with a running guest and a few pages, without a hypervisor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.abi.snp_command import (
    Activate,
    Command,
    GctxAddress,
    InitEx,
    InitExFlags,
    LaunchFinish,
    LaunchStart,
    LaunchUpdate,
    LaunchUpdateInfo,
    PageType,
)
from swsnp.abi.snp_launch import SecretsPage
from swsnp.abi.snp_report import GuestPolicy, Product
from swsnp.crypto.derive import SeededEntropy
from swsnp.crypto.seal import MessageKey
from swsnp.firmware.chip import Chip
from swsnp.firmware.mailbox import Mailbox
from swsnp.hardware import Rmp, RmpEntry, SystemMemory
from swsnp.trace import Trace

if TYPE_CHECKING:
    from swsnp.abi.record import Record

__all__ = ["FIRMWARE_PAGE", "FuzzedChip"]

FIRMWARE_PAGE = RmpEntry(assigned=True, immutable=True)
_ASID = 1


class FuzzedChip:
    """`pages`: context, secrets page, Firmware, Pre-Guest, Guest-Invalid, Hypervisor, Reclaim, Firmware."""

    def __init__(self) -> None:
        self.chip = Chip(
            product=Product.GENOA,
            secret=bytes(range(32)),
            entropy=SeededEntropy(b"fuzz"),
            deterministic=True,
        )
        self.memory, self.rmp = SystemMemory(), Rmp()
        self.mailbox = Mailbox(self.chip, memory=self.memory, rmp=self.rmp, trace=Trace())
        self.buffer = self.memory.allocate_page()
        guest = RmpEntry(assigned=True, asid=_ASID, gpa=0x2000)
        self.states = (
            FIRMWARE_PAGE,
            RmpEntry(assigned=True, asid=_ASID, gpa=0x1000, immutable=True),
            FIRMWARE_PAGE,
            RmpEntry(assigned=True, asid=_ASID, gpa=0x3000, immutable=True),
            guest,
            RmpEntry(),
            RmpEntry(assigned=True),
            FIRMWARE_PAGE,
        )
        self.pages = [self.memory.allocate_page() for _ in self.states]
        self._launch()

    def command(self, command: int, record: Record | bytes = b"") -> int:
        self.memory.write(self.buffer, bytes(record))
        return self.mailbox.command(command, self.buffer)

    def reset(self) -> None:
        """The states that executions begin with; memory stays."""
        for page, entry in zip(self.pages[2:], self.states[2:], strict=True):
            self.rmp[page] = entry

    def _launch(self) -> None:
        gctx, secrets = self.pages[:2]
        init = InitEx(flags=InitExFlags.of(init_rmp=1))
        assert self.command(Command.SNP_INIT_EX, init) == 0
        assert self.command(Command.SNP_DF_FLUSH) == 0
        self.rmp[gctx] = FIRMWARE_PAGE
        for command, record in (
            (Command.SNP_GCTX_CREATE, GctxAddress(gctx_paddr=gctx)),
            (Command.SNP_LAUNCH_START, LaunchStart(gctx_paddr=gctx, policy=GuestPolicy(0x30000))),
            (Command.SNP_ACTIVATE, Activate(gctx_paddr=gctx, asid=_ASID)),
        ):
            assert self.command(command, record) == 0
        self.rmp[secrets] = self.states[1]
        info = LaunchUpdateInfo.of(page_type=PageType.SECRETS)
        update = LaunchUpdate(gctx_paddr=gctx, info=info, page_paddr=secrets)
        assert self.command(Command.SNP_LAUNCH_UPDATE, update) == 0
        assert self.command(Command.SNP_LAUNCH_FINISH, LaunchFinish(gctx_paddr=gctx)) == 0
        found = SecretsPage.parse(self.memory.read(secrets, 4096))
        self.keys = [MessageKey(key) for key in (found.vmpck0, found.vmpck1, found.vmpck2, found.vmpck3)]
        self.reset()
