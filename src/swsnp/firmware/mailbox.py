"""The mailbox: a command id and the address of its buffer in, a status out. Source: AMD 56860, chapter 8."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from swsnp import trace as events
from swsnp.abi import snp_command as abi
from swsnp.abi import snp_page_command as page_abi
from swsnp.abi.snp_command import Command, FirmwareStatus, PlatformState
from swsnp.abi.snp_mitigation import VerifyMitigation
from swsnp.firmware import guests, launch, migration, pages, platform, swap
from swsnp.firmware.download import download_firmware_ex
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.features import feature_info
from swsnp.firmware.guest_request import guest_request
from swsnp.firmware.hv_report import hv_report_request
from swsnp.firmware.mitigations import VERIFY_MITIGATION_SINCE, verify_mitigation
from swsnp.firmware.platform import Platform
from swsnp.firmware.vlek import vlek_load
from swsnp.hardware.memory import PAGE, BusError, SystemMemory
from swsnp.hardware.rmp import PageState, Rmp

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record
    from swsnp.firmware.chip import Chip
    from swsnp.hardware.turn import Turn
    from swsnp.trace import Trace

__all__ = ["COMMANDS", "LATER_COMMANDS", "Mailbox"]


class _Row(NamedTuple):
    """One command: the layout of its buffer (None: it has no buffer), what carries it out.

    `writes_buffer`: a legacy command, whose handler returns the buffer as it goes back.
    """

    buffer: type[Record] | None
    handler: Callable[[Platform, Any], Record | None]
    writes_buffer: bool = False


_INIT_ALL: Final = abi.InitEx(flags=abi.InitExFlags.of(init_rmp=1))

COMMANDS: Final[dict[int, _Row]] = {
    Command.GET_ID: _Row(abi.GetId, platform.get_id, writes_buffer=True),
    Command.NOP: _Row(None, lambda _here, _none: None),
    Command.SNP_INIT: _Row(None, lambda here, _none: platform.init(here, _INIT_ALL)),
    Command.SNP_SHUTDOWN: _Row(None, lambda here, _none: platform.shutdown(here)),
    Command.SNP_PLATFORM_STATUS: _Row(abi.PlatformStatus, platform.platform_status),
    Command.SNP_DF_FLUSH: _Row(None, lambda here, _none: platform.df_flush(here)),
    Command.SNP_INIT_EX: _Row(abi.InitEx, platform.init),
    Command.SNP_SHUTDOWN_EX: _Row(abi.ShutdownEx, platform.shutdown_ex),
    Command.SNP_DECOMMISSION: _Row(abi.GctxAddress, guests.decommission),
    Command.SNP_ACTIVATE: _Row(abi.Activate, guests.activate),
    Command.SNP_GUEST_STATUS: _Row(abi.GuestStatus, guests.guest_status),
    Command.SNP_GCTX_CREATE: _Row(abi.GctxAddress, guests.gctx_create),
    Command.SNP_GUEST_REQUEST: _Row(abi.GuestRequest, guest_request),
    Command.SNP_ACTIVATE_EX: _Row(abi.ActivateEx, guests.activate_ex),
    Command.SNP_LAUNCH_START: _Row(abi.LaunchStart, launch.launch_start),
    Command.SNP_LAUNCH_UPDATE: _Row(abi.LaunchUpdate, launch.launch_update),
    Command.SNP_LAUNCH_FINISH: _Row(abi.LaunchFinish, launch.launch_finish),
    Command.SNP_DBG_DECRYPT: _Row(page_abi.DebugCopy, pages.dbg_decrypt),
    Command.SNP_DBG_ENCRYPT: _Row(page_abi.DebugCopy, pages.dbg_encrypt),
    Command.SNP_PAGE_SWAP_OUT: _Row(page_abi.PageSwap, swap.page_swap_out),
    Command.SNP_PAGE_SWAP_IN: _Row(page_abi.PageSwap, swap.page_swap_in),
    Command.SNP_PAGE_MOVE: _Row(page_abi.PageMove, pages.page_move),
    Command.SNP_PAGE_MD_INIT: _Row(page_abi.PageMdInit, pages.page_md_init),
    Command.SNP_PAGE_SET_STATE: _Row(page_abi.PageSetState, pages.page_set_state),
    Command.SNP_PAGE_RECLAIM: _Row(abi.PageReclaim, guests.page_reclaim),
    Command.SNP_PAGE_UNSMASH: _Row(page_abi.PageUnsmash, pages.page_unsmash),
    Command.SNP_CONFIG: _Row(abi.Config, platform.config),
    Command.SNP_DOWNLOAD_FIRMWARE_EX: _Row(abi.DownloadFirmwareEx, download_firmware_ex),
    Command.SNP_COMMIT: _Row(abi.Commit, platform.commit),
    Command.SNP_VLEK_LOAD: _Row(abi.VlekLoad, vlek_load),
    Command.SNP_FEATURE_INFO: _Row(abi.FeatureInfo, feature_info),
}
"""The commands that are built in; any other id is answered INVALID_COMMAND."""

LATER_COMMANDS: Final[dict[int, tuple[tuple[int, int], _Row]]] = {
    Command.SNP_HV_REPORT_REQ: ((1, 56), _Row(abi.HvReportReq, hv_report_request)),
    Command.SNP_VERIFY_MITIGATION: (VERIFY_MITIGATION_SINCE, _Row(VerifyMitigation, verify_mitigation)),
}
"""Commands that exist from a firmware's API version (major, minor) on."""


class Mailbox:
    """A chip put on a memory and an RMP.

    Not thread safe by itself: a secure processor does one thing at a time.

    Args:
        chip: identity, settings and variables; a mailbox made anew on it is a reset of SNP.
        memory: shared with the hypervisor.
        rmp: shared with the hypervisor.
        trace: where events go.
        lock: what several callers hold over `command`; let go while a report is signed. None: one caller.
        sleep: waits for seconds; only injected delays use it.
    """

    def __init__(
        self,
        chip: Chip,
        *,
        memory: SystemMemory,
        rmp: Rmp,
        trace: Trace,
        lock: Turn | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.platform = Platform(chip, memory=memory, rmp=rmp, trace=trace, lock=lock)
        self._memory = memory
        self._trace = trace
        self._sleep = sleep
        self._injected: dict[int, tuple[int, int | None]] = {}
        self._delays: dict[int, tuple[float, int | None]] = {}

    def command(self, command: int, buffer: int) -> int:
        """Carry out one command.

        Args:
            command: mailbox command id.
            buffer: system physical address of the command buffer; ignored by commands without one.

        Returns:
            The status; never raises for anything that host or guest put into memory.
        """
        if self._delays:
            self._wait(command)
        status = self._take_injected(command) if self._injected else None
        if status is None:
            status = self._carry_out(command, buffer)
        if (emit := self._trace.emit) is not None:
            emit(events.FirmwareCommand(command=command, status=status))
        return status

    def _carry_out(self, command: int, buffer: int) -> int:
        row = COMMANDS.get(command) or self._later(command)
        if row is None:
            return FirmwareStatus.INVALID_COMMAND
        try:
            if row.buffer is None:
                row.handler(self.platform, None)
            else:
                # a private copy, made once: what the host changes meanwhile is not seen
                record = row.buffer.parse(self._memory.read(buffer, row.buffer.SIZE))
                if row.writes_buffer:
                    return self._carry_out_legacy(row, buffer, record)
                row.handler(self.platform, record)
        except FirmwareFault as fault:
            return fault.status
        except BusError:
            return FirmwareStatus.INVALID_ADDRESS
        return FirmwareStatus.SUCCESS

    def _later(self, command: int) -> _Row | None:
        since, row = LATER_COMMANDS.get(command, (None, None))
        version = self.platform.chip.variables.current_version
        return row if since is not None and version.api >= since else None

    def _carry_out_legacy(self, row: _Row, buffer: int, record: Record) -> int:
        """A command that returns data in its buffer; while SNP is INIT that lies in Firmware pages only."""
        pages = range(buffer & -PAGE, buffer + record.SIZE, PAGE)
        rmp, initialised = self.platform.rmp, self.platform.state is PlatformState.INIT
        if initialised:
            owned = all(rmp.state(page) is PageState.FIRMWARE for page in pages)
            require(owned, FirmwareStatus.INVALID_PAGE_STATE)
        status, result = FirmwareStatus.SUCCESS, None
        try:
            result = row.handler(self.platform, record)
        except FirmwareFault as fault:
            status, result = fault.status, fault.buffer
        if result is not None:
            self._memory.write(buffer, bytes(result))
        if initialised:
            for page in pages:
                guests.reclaim(rmp, page)
        return status

    def save_guest(self, gctx_paddr: int) -> bytes:
        """A guest as bytes that `restore_guest` takes; not a command of AMD's.

        For stopping a whole machine. The bytes contain the guest's keys: treat them as a secret. The guest
        stays as it is; no command may run meanwhile.

        Raises:
            UsageError: there is no guest context at this address.
        """
        return migration.save_guest(self.platform, gctx_paddr)

    def restore_guest(self, gctx_paddr: int, context: bytes, *, asid: int) -> None:
        """Continue a saved guest: REPORT_ID, launch TCB, VMPCKs, counters. Not a command of AMD's.

        Args:
            gctx_paddr: a page in state Firmware; becomes Context.
            context: what `save_guest` gave.
            asid: a clean ASID (after SNP_DF_FLUSH); 0 when the guest had none.

        Raises:
            LayoutError: the bytes have another size.
            UsageError: anything else that does not fit; see `migration.restore_guest`.
        """
        migration.restore_guest(self.platform, gctx_paddr, context, asid=asid)

    def inject(self, command: int, status: int, times: int | None = 1) -> None:
        """Answer a command with a status instead of carrying it out.

        Args:
            command: command id.
            status: any number.
            times: how often; None: until `inject` is called for it again, 0: no longer.
        """
        if times == 0:
            self._injected.pop(command, None)
        else:
            self._injected[command] = (status, times)

    def _take_injected(self, command: int) -> int | None:
        found = self._injected.get(command)
        if found is None:
            return None
        status, times = found
        if times is not None:
            self.inject(command, status, times - 1)
        return status

    def delay(self, command: int, seconds: float, times: int | None = 1) -> None:
        """Let a command take longer; it is carried out, or answered as injected, after that.

        Args:
            command: command id.
            seconds: how long to wait first.
            times: as `inject`.
        """
        if times == 0:
            self._delays.pop(command, None)
        else:
            self._delays[command] = (seconds, times)

    def _wait(self, command: int) -> None:
        found = self._delays.get(command)
        if found is None:
            return
        seconds, times = found
        if times is not None:
            self.delay(command, seconds, times - 1)
        self._sleep(seconds)
