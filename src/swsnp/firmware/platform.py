"""A chip on its memory and RMP: the state that commands work on, and the platform commands.

Source: AMD 56860, platform management and commands 81h..86h, C9h, CBh; legacy GET_ID.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import (
    RANGE_LIST_MAX,
    Commit,
    Config,
    FirmwareStatus,
    GetId,
    InitEx,
    InitExFlags,
    PlatformState,
    PlatformStatus,
    PlatformStatusBuffer,
    RangeElement,
    RangeListHeader,
    ShutdownEx,
)
from swsnp.errors import UsageError
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.hardware.memory import PAGE, BusError, SystemMemory
from swsnp.hardware.rmp import PageState, Rmp, RmpEntry

if TYPE_CHECKING:
    from types import TracebackType

    from swsnp.firmware.chip import Chip, PlatformVariables
    from swsnp.firmware.context import GuestContext
    from swsnp.hardware.turn import Turn
    from swsnp.trace import Trace

__all__ = [
    "AsidState",
    "Platform",
    "commit",
    "config",
    "df_flush",
    "get_id",
    "init",
    "platform_status",
    "range_list",
    "shutdown",
    "shutdown_ex",
]

_PAGE_MASK: Final = PAGE - 1
_LARGE_MASK: Final = (2 << 20) - 1
_ID_SIZE: Final = 0x40
_IOMMU_SNP_SHUTDOWN: Final = 1
_X86_SNP_SHUTDOWN: Final = 2


class AsidState(Enum):
    """An ASID on the core complexes; the model keeps one state for all of them."""

    DIRTY = "dirty"
    CLEAN = "clean"
    ALLOCATED = "allocated"
    IN_USE = "in use"


class _Aside:
    """A lock that is let go inside, and held again afterwards."""

    __slots__ = ("_lock",)

    def __init__(self, lock: Turn) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.acquire()


class Platform:
    """What the firmware knows between commands."""

    def __init__(
        self, chip: Chip, *, memory: SystemMemory, rmp: Rmp, trace: Trace, lock: Turn | None = None
    ) -> None:
        self.aside: AbstractContextManager[None] = nullcontext() if lock is None else _Aside(lock)
        """Other commands may run inside: for work that changes no state."""
        self.chip = chip
        self.memory = memory
        self.rmp = rmp
        self.trace = trace
        self.state = PlatformState.UNINIT
        self.rmp_initialised_for: object = None
        """The TCB that the RMP was initialised under; None: not since reset."""
        self.guests: dict[int, GuestContext] = {}
        self.asids: dict[int, AsidState] = {}
        self.max_asid = chip.settings.max_asid
        self.wbinvd_done = True
        """Whether every core executed WBINVD since an ASID was deactivated; a host model may clear it."""

    def is_unchanged(
        self,
        variables: PlatformVariables,
        *,
        gctx_paddr: int,
        guest: GuestContext,
        page: int,
        entry: RmpEntry,
    ) -> bool:
        """Whether what was made aside still stands on the same: each is replaced as a whole when it changes.

        Args:
            variables: of the chip, as they were.
            gctx_paddr: where `guest` was.
            guest: whom it is for.
            page: where it goes.
            entry: the page's RMP entry, as it was.
        """
        return (
            self.chip.variables is variables
            and self.guests.get(gctx_paddr) is guest
            and self.rmp[page] is entry
        )

    def require_init(self) -> None:
        """The platform state check of guest commands."""
        if self.state is not PlatformState.INIT:
            raise FirmwareFault(FirmwareStatus.INVALID_PLATFORM_STATE)

    def look_up(self, address: int, unreadable: FirmwareStatus = FirmwareStatus.INVALID_ADDRESS) -> RmpEntry:
        """The RMP entry of a page that a command names.

        Raises:
            FirmwareFault: no memory answers there: `unreadable`.
        """
        if not self.memory.has_page(address):
            raise FirmwareFault(unreadable)
        return self.rmp[address]

    def guest(self, gctx_paddr: int) -> GuestContext:
        """The context behind a page that the host names as one.

        Raises:
            FirmwareFault: INVALID_GUEST, the page is not in state Context or its guest was forgotten.
        """
        found = self.guests.get(gctx_paddr)
        if found is None or self.rmp[gctx_paddr].state is not PageState.CONTEXT:
            raise FirmwareFault(FirmwareStatus.INVALID_GUEST)
        return found

    def require_output(self, address: int, size: int, entry: RmpEntry) -> None:
        """A page that a status goes to is Firmware once SNP is initialised."""
        if self.state is PlatformState.INIT:
            require(entry.state is PageState.FIRMWARE, FirmwareStatus.INVALID_PAGE_STATE)
        self.memory.view(address, size)


def _crosses_page(address: int, size: int) -> bool:
    return (address & _PAGE_MASK) + size > PAGE


def init(platform: Platform, buffer: InitEx) -> None:
    """SNP_INIT_EX; SNP_INIT is the same with INIT_RMP.

    1. Reserved bits, or a feature that the part lacks: INVALID_PARAM.
    2. SNP is INIT already: INVALID_PLATFORM_STATE.
    3. Without INIT_RMP: the RMP was never initialised, or under another TCB: RMP_INIT_REQUIRED; a range list:
       INVALID_PARAM.
    4. Hardware configuration: INVALID_CONFIG (a setting of the chip).
    """
    settings, flags = platform.chip.settings, buffer.flags
    unknown = flags.unnamed() or buffer.reserved_04 or any(buffer.reserved_12) or flags.tio_en
    lacking = flags.ciphertext_hiding_en and not settings.ciphertext_hiding_cap
    require(not (unknown or lacking), FirmwareStatus.INVALID_PARAM)
    require(platform.state is PlatformState.UNINIT, FirmwareStatus.INVALID_PLATFORM_STATE)
    if not flags.init_rmp:
        tcb = platform.chip.variables.current_tcb
        require(platform.rmp_initialised_for == tcb, FirmwareStatus.RMP_INIT_REQUIRED)
        require(not flags.list_paddr_en, FirmwareStatus.INVALID_PARAM)
    require(settings.hardware_configuration_ok, FirmwareStatus.INVALID_CONFIG)
    ranges = range_list(platform, buffer.list_paddr) if flags.list_paddr_en else ()
    if flags.init_rmp:
        platform.rmp.clear()
        for element in ranges:
            _fix(platform, element)
    _start(platform, flags, buffer.max_snp_asid)


def _start(platform: Platform, flags: InitExFlags, max_snp_asid: int) -> None:
    chip = platform.chip
    hiding = bool(flags.ciphertext_hiding_en)
    platform.max_asid = min(chip.settings.max_asid, max_snp_asid) if hiding else chip.settings.max_asid
    chip.variables = replace(
        chip.variables,
        rapl_dis=chip.settings.rapl_dis or bool(flags.rapl_dis),
        ciphertext_hiding_en=chip.settings.ciphertext_hiding_en or hiding,
    )
    platform.rmp_initialised_for = chip.variables.current_tcb
    platform.asids = dict.fromkeys(range(1, platform.max_asid + 1), AsidState.DIRTY)
    platform.guests.clear()
    platform.state = PlatformState.INIT


def _fix(platform: Platform, element: RangeElement) -> None:
    """Make a range HV-Fixed. Ranges are mostly holes: what no memory answers for needs no entries."""
    start, end = element.base, element.base + element.page_count * PAGE
    for base, size in platform.memory.regions():
        for page in range(max(start, base), min(end, base + size), PAGE):
            platform.rmp[page] = RmpEntry(immutable=True)


def range_list(platform: Platform, address: int) -> tuple[RangeElement, ...]:
    """The range list of SNP_INIT_EX and SNP_PAGE_SET_STATE.

    More than 255 elements, reserved bits, no memory there: INVALID_PARAM.
    """
    try:
        header = RangeListHeader.parse(platform.memory.read(address, RangeListHeader.SIZE))
        require(header.num_elements <= RANGE_LIST_MAX, FirmwareStatus.INVALID_PARAM)
        raw = platform.memory.read(
            address + RangeListHeader.SIZE, header.num_elements * RangeElement.SIZE
        )  # fmt: skip
    except BusError:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM) from None
    elements = tuple(RangeElement.parse_at(raw, at) for at in range(0, len(raw), RangeElement.SIZE))
    bad = header.reserved_04 or any(each.reserved_0c or each.base & _PAGE_MASK for each in elements)
    require(not bad, FirmwareStatus.INVALID_PARAM)
    return elements


def shutdown(platform: Platform) -> None:
    """SNP_SHUTDOWN: nothing to do when UNINIT; an ASID that is not clean: DFFLUSH_REQUIRED."""
    if platform.state is PlatformState.UNINIT:
        return
    _require_clean(platform)
    _stop(platform)


def shutdown_ex(platform: Platform, buffer: ShutdownEx) -> None:
    """SNP_SHUTDOWN_EX: as SNP_SHUTDOWN, then LEN, reserved bits, and X86 without IOMMU: INVALID_PARAM."""
    if platform.state is PlatformState.UNINIT:
        return
    _require_clean(platform)
    require(buffer.length == ShutdownEx.SIZE, FirmwareStatus.INVALID_PARAM)
    require(not buffer.flags & ~(_IOMMU_SNP_SHUTDOWN | _X86_SNP_SHUTDOWN), FirmwareStatus.INVALID_PARAM)
    require(buffer.flags != _X86_SNP_SHUTDOWN, FirmwareStatus.INVALID_PARAM)
    _stop(platform)
    if buffer.flags & _IOMMU_SNP_SHUTDOWN:
        platform.rmp_initialised_for = None


def _require_clean(platform: Platform) -> None:
    clean = all(state is AsidState.CLEAN for state in platform.asids.values())
    require(clean, FirmwareStatus.DFFLUSH_REQUIRED)


def _stop(platform: Platform) -> None:
    # pages keep their RMP state until the RMP is initialised again
    for guest in platform.guests.values():
        guest.erase()
    platform.guests.clear()
    platform.chip.wipe_vlek()
    platform.state = PlatformState.UNINIT


def df_flush(platform: Platform) -> None:
    """SNP_DF_FLUSH: WBINVD missing: WBINVD_REQUIRED; else every dirty ASID becomes clean."""
    require(platform.wbinvd_done, FirmwareStatus.WBINVD_REQUIRED)
    for asid, state in platform.asids.items():
        if state is AsidState.DIRTY:
            platform.asids[asid] = AsidState.CLEAN


def platform_status(platform: Platform, buffer: PlatformStatus) -> None:
    """SNP_PLATFORM_STATUS.

    1. The status buffer crosses a page, or is not memory: INVALID_PARAM.
    2. SNP is INIT and the page is not Firmware: INVALID_PAGE_STATE.
    """
    crosses = _crosses_page(buffer.status_paddr, PlatformStatusBuffer.SIZE)
    require(not crosses, FirmwareStatus.INVALID_PARAM)
    entry = platform.look_up(buffer.status_paddr, FirmwareStatus.INVALID_PARAM)
    platform.require_output(buffer.status_paddr, PlatformStatusBuffer.SIZE, entry)
    platform.memory.write(buffer.status_paddr, bytes(status_buffer(platform)))


def status_buffer(platform: Platform) -> PlatformStatusBuffer:
    """The content of the status buffer at this moment."""
    settings, variables = platform.chip.settings, platform.chip.variables
    rmp_initialised = platform.rmp_initialised_for is not None
    return PlatformStatusBuffer(
        api_major=variables.current_version.major,
        api_minor=variables.current_version.minor,
        state=platform.state,
        rmp_flags=rmp_initialised | settings.alias_check_complete << 1,
        build_id=variables.current_version.build,
        flags=variables.mask_chip_id
        | variables.mask_chip_key << 1
        | (variables.vlek is not None) << 2
        | 1 << 3  # SNP_FEATURE_INFO exists
        | variables.rapl_dis << 4
        | settings.ciphertext_hiding_cap << 5
        | variables.ciphertext_hiding_en << 6,
        guest_count=sum(guest.state != 0 for guest in platform.guests.values()),
        current_tcb=variables.current_tcb,
        reported_tcb=variables.reported_tcb,
    )


def config(platform: Platform, buffer: Config) -> None:
    """SNP_CONFIG, in any platform state.

    Reserved bits: INVALID_PARAM; REPORTED_TCB not 0 and a component above the committed TCB: INVALID_PARAM.
    Firmware 1.55 compares the components as one number; per component is what AMD 56860 means.
    """
    flags = buffer.flags
    require(not (flags.unnamed() or any(buffer.reserved_0c)), FirmwareStatus.INVALID_PARAM)
    try:
        platform.chip.configure(
            reported_tcb=buffer.reported_tcb,
            mask_chip_id=bool(flags.mask_chip_id),
            mask_chip_key=bool(flags.mask_chip_key),
        )
    except UsageError:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM) from None


def commit(platform: Platform, buffer: Commit) -> None:
    """SNP_COMMIT, in any platform state; LEN not 4: INVALID_PARAM."""
    require(buffer.length == Commit.SIZE, FirmwareStatus.INVALID_PARAM)
    platform.chip.commit()


def get_id(platform: Platform, buffer: GetId) -> GetId:
    """GET_ID: 40h bytes per socket.

    LEN too small: LEN becomes what is needed, INVALID_LENGTH. Returns the command buffer with LEN as written.
    """
    ids = b"".join(platform.chip.chip_ids)
    if buffer.length < _ID_SIZE:
        raise FirmwareFault(FirmwareStatus.INVALID_LENGTH, buffer.but(length=_ID_SIZE))
    data = ids[: buffer.length // _ID_SIZE * _ID_SIZE]
    platform.require_output(buffer.id_paddr, len(data), platform.look_up(buffer.id_paddr))
    platform.memory.write(buffer.id_paddr, data)
    return buffer.but(length=len(data))
