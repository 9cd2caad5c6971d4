"""The kernel's driver of the secure processor: command mailbox, page states for the firmware, lost pages.

Source: Linux, drivers/crypto/ccp/sev-dev.c and arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from swsnp.abi.snp_command import (
    Command,
    FeatureInfo,
    FeatureInfoOutput,
    InitEx,
    InitExFlags,
    PageReclaim,
    PlatformStatus,
    PlatformStatusBuffer,
)
from swsnp.abi.snp_report import GuestPolicy
from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import RmpUpdate, RmpUpdateCode
from swsnp.hardware.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record
    from swsnp.hardware.memory import SystemMemory
    from swsnp.hardware.rmp import Rmp

__all__ = ["DescriptorTable", "DriverResult", "PspDriver", "SecureProcessor", "SevFile"]

_logger = logging.getLogger(__name__)

_FEATURE_INFO_FLAG: Final = 1 << 3
"""Bit of the status buffer's flags: SNP_FEATURE_INFO exists."""
_BASE_POLICY: Final = 0x1F_FFFF
"""ABI version, SMT, reserved-one, migration agent, debug, single socket."""
_PAGE_SWAP_DISABLE_SINCE: Final = (1, 58)


class SecureProcessor(Protocol):
    """The mailbox as the driver sees it."""

    def command(self, command: int, buffer: int) -> int:
        """Run a command on the buffer at a system physical address; its status.

        Raises:
            TimeoutError: no answer came; the driver then gives the processor up.
        """
        ...


class SevFile:
    """An open file of /dev/sev: what KVM wants to find under the number that a VMM names."""


class DescriptorTable(Protocol):
    """The calling process, as far as a descriptor is looked up in it."""

    def descriptor(self, fd: int) -> object | None:
        """The open file, or None."""
        ...


class DriverResult(NamedTuple):
    """What became of a command: `ret` is 0 or -errno, `fw` the firmware's status (16 bits, 0 without one)."""

    ret: int
    fw: int


_OK: Final = DriverResult(0, 0)
_NO_DEVICE: Final = DriverResult(-errno.ENODEV, 0)
_DEAD: Final = DriverResult(-errno.EBUSY, 0)
_TIMED_OUT: Final = DriverResult(-errno.ETIMEDOUT, 0)
_BAD_FD: Final = DriverResult(-errno.EBADF, 0)


class PspDriver:
    """One per host kernel. Commands of all VMs meet at its mutex."""

    def __init__(
        self,
        mailbox: SecureProcessor | None,
        *,
        memory: SystemMemory,
        rmp: Rmp,
        snp_host: bool = True,
        mutex: Turn | None = None,
    ) -> None:
        """`mailbox` None: no device. `snp_host` False: the host runs without an RMP.

        `mutex`: held over a command. A processor that was given the same one may let it go once it has copied
        the command buffer, and holds it again when it returns.
        """
        self._mailbox = mailbox
        self.memory = memory
        self._rmp = rmp
        self._snp_host = snp_host
        self._mutex = mutex or Turn()
        self._buffer_page = memory.allocate_page()
        self._buffer = memory.view(self._buffer_page, PAGE)
        self.policy_bits: int = _BASE_POLICY
        """Guest policy bits that this firmware supports."""
        self.dead = False
        """An earlier command timed out."""
        self.initialised = False
        """SNP_INIT_EX succeeded."""
        self.leaked: list[int] = []
        """Pages that could not be taken back; they are never used again."""

    # Commands

    @property
    def present(self) -> bool:
        """Whether there is a secure processor at all."""
        return self._mailbox is not None

    def issue(self, command: int, buffer: bytes = b"") -> DriverResult:
        """Run one command.

        Args:
            command: mailbox command id.
            buffer: its command buffer; copied to the driver's own page, at most 4,096 bytes.

        Returns:
            -ENODEV without a device, -EBUSY after it was given up, -ETIMEDOUT when that happens now,
            -EIO and the status when the firmware refused.
        """
        mailbox = self._mailbox
        if mailbox is None:
            return _NO_DEVICE
        with self._mutex:
            if self.dead:
                return _DEAD
            self._buffer[: len(buffer)] = buffer
            try:
                status = mailbox.command(command, self._buffer_page)
            except TimeoutError:
                return self._give_up(command)
        return DriverResult(-errno.EIO, status & 0xFFFF) if status else _OK

    def issue_by_fd(self, task: DescriptorTable, fd: int, command: int, buffer: bytes) -> DriverResult:
        """`issue` for a process that names an open /dev/sev: -EBADF when `fd` is closed or another."""
        if not isinstance(task.descriptor(fd), SevFile):
            return _BAD_FD
        return self.issue(command, buffer)

    @staticmethod
    def refused(ret: int) -> DriverResult:
        """The result of a command that was not even tried: `ret` is -errno."""
        return DriverResult(ret, 0)

    def issue_answered(self, command: int, buffer: bytes, output: int) -> tuple[DriverResult, bytes]:
        """A legacy command that writes its own command buffer and one further page.

        Both pages are the firmware's while it works, as SNP asks.

        Args:
            command: mailbox command id.
            buffer: its command buffer.
            output: system address of the further page; 0 for none.

        Returns:
            The result, and the command buffer as the firmware left it.
        """
        page = self.memory.allocate_page()
        self.memory.write(page, buffer)
        lent = [each for each in (page, output) if each and self.lend(each)]
        result = self._run(command, page)
        answered = self.memory.read(page, len(buffer))
        for each in lent:
            self.reclaim(each)
        self.free_page(page)
        return result, answered

    def issue_into_page(
        self, command: int, describe: Callable[[int], Record], size: int
    ) -> tuple[DriverResult, bytes]:
        """A command that writes a page named in its buffer.

        Args:
            command: mailbox command id.
            describe: from the page's system address to the command buffer.
            size: bytes of the page to return.

        Returns:
            The result, and the first `size` bytes of the page (zeros when the command failed).
        """
        page = self.memory.allocate_page()
        lent = self.lend(page)
        result = self.issue(command, bytes(describe(page)))
        written = self.memory.read(page, size)
        if lent:
            self.reclaim(page)
        self.free_page(page)
        return result, written

    def _run(self, command: int, buffer_page: int) -> DriverResult:
        if self._mailbox is None:
            return _NO_DEVICE
        with self._mutex:
            if self.dead:
                return _DEAD
            try:
                status = self._mailbox.command(command, buffer_page)
            except TimeoutError:
                return self._give_up(command)
        return DriverResult(-errno.EIO, status & 0xFFFF) if status else _OK

    def _give_up(self, command: int) -> DriverResult:
        self.dead = True
        _logger.info("command %#x timed out: the secure processor is given up", command)
        return _TIMED_OUT

    # Platform

    def initialise(self) -> DriverResult:
        """SNP_INIT_EX with a fresh RMP, then SNP_DF_FLUSH for the first guest; nothing when that was done."""
        if self.initialised:
            return _OK
        result = self.issue(Command.SNP_INIT_EX, bytes(InitEx(flags=InitExFlags.of(init_rmp=1))))
        if result.ret == 0:
            result = self.issue(Command.SNP_DF_FLUSH)
        if result.ret:
            _logger.info("SNP initialisation failed: %s", result)
            return result
        self.initialised = True
        self.policy_bits = self._ask_policy_bits()
        return _OK

    def platform_status(self) -> tuple[DriverResult, PlatformStatusBuffer]:
        """SNP_PLATFORM_STATUS."""
        result, raw = self.issue_into_page(
            Command.SNP_PLATFORM_STATUS,
            lambda page: PlatformStatus(status_paddr=page),
            PlatformStatusBuffer.SIZE,
        )
        return result, PlatformStatusBuffer.parse(raw)

    def _ask_policy_bits(self) -> int:
        result, status = self.platform_status()
        if result.ret or not status.flags & _FEATURE_INFO_FLAG:
            return _BASE_POLICY
        result, raw = self.issue_into_page(
            Command.SNP_FEATURE_INFO,
            lambda page: FeatureInfo(length=FeatureInfo.SIZE, ecx_in=0, feature_info_paddr=page),
            FeatureInfoOutput.SIZE,
        )
        if result.ret:
            return _BASE_POLICY
        ecx = FeatureInfoOutput.parse(raw).ecx
        return _BASE_POLICY | GuestPolicy.of(
            rapl_dis=ecx >> 2 & 1,
            ciphertext_hiding_dram=ecx >> 3 & 1,
            mem_aes_256_xts=ecx >> 4 & 1,
            cxl_allow=ecx >> 5 & 1,
            page_swap_disable=int((status.api_major, status.api_minor) >= _PAGE_SWAP_DISABLE_SINCE),
        )

    # Page states

    def make_private(self, spa: int, *, gpa: int, asid: int, immutable: bool, page_size: int = 0) -> int:
        """RMPUPDATE of a page to a guest: Pre-Guest if immutable, else Guest-Invalid; as `make_shared`."""
        new = RmpUpdate(assigned=True, asid=asid, gpa=gpa, immutable=immutable, page_size=page_size)
        return self._update(spa, new)

    def make_firmware(self, spa: int) -> int:
        """RMPUPDATE of a page to the Firmware state; as `make_shared`."""
        return self._update(spa, RmpUpdate(assigned=True, immutable=True))

    def make_shared(self, spa: int) -> int:
        """RMPUPDATE of a page to the Hypervisor state: 0, -ENODEV without SNP on the host, else -EFAULT."""
        return self._update(spa, RmpUpdate())

    def _update(self, spa: int, new: RmpUpdate) -> int:
        if not self._snp_host:
            return -errno.ENODEV
        code = self._rmp.rmpupdate(spa, new)
        return 0 if code == RmpUpdateCode.SUCCESS else -errno.EFAULT

    def reclaim(self, spa: int) -> int:
        """SNP_PAGE_RECLAIM, then shared: 0, or -EIO, and the page is lost for good (`leaked`)."""
        if self.issue(Command.SNP_PAGE_RECLAIM, bytes(PageReclaim(page_paddr=spa))).ret or self.make_shared(
            spa
        ):
            self.leak(spa)
            return -errno.EIO
        return 0

    def lend(self, spa: int) -> bool:
        """Give a page to the firmware where SNP asks for it; True when `reclaim` must take it back."""
        return self.initialised and self.make_firmware(spa) == 0

    # Pages of the kernel's own

    def allocate_firmware_page(self) -> int | None:
        """A zeroed page in the Firmware state; None when the RMP refuses."""
        page = self.memory.allocate_page()
        if self.make_firmware(page):
            self.free_page(page)
            return None
        return page

    def free_firmware_page(self, spa: int) -> None:
        """Take a page back from the firmware and free it; one that cannot be taken back is lost."""
        if self.reclaim(spa) == 0:
            self.free_page(spa)

    def free_page(self, spa: int) -> None:
        """Free a page of the kernel's own, unless it was lost."""
        if spa not in self.leaked:
            self.memory.free_page(spa)

    def leak(self, spa: int) -> None:
        """Put a page on the list of lost pages: one that stays assigned must never be used again."""
        self.leaked.append(spa)
        _logger.info("page %#x is lost: %s, %d in all", spa, self._rmp.state(spa).value, len(self.leaked))
