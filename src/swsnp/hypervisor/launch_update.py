"""KVM_SEV_SNP_LAUNCH_UPDATE: pages of the initial image. Source: Linux, arch/x86/kvm/svm/sev.c."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import KvmSevCmd, KvmSevSnpLaunchUpdate, MemoryAttribute
from swsnp.abi.snp_command import Command, FirmwareStatus, PageType
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hypervisor.launch_common import EFAULT, EINVAL, OK, Step, copy_in, update_buffer

if TYPE_CHECKING:
    from swsnp.hypervisor.memory import MemorySlot
    from swsnp.hypervisor.psp_driver import DriverResult
    from swsnp.hypervisor.vm import Vm

__all__ = ["launch_update"]

_LARGE: Final = 2 << 20
_LARGE_PAGES: Final = _LARGE // PAGE
_LARGE_TYPES: Final = frozenset({PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED})
_LOADABLE: Final = frozenset(
    {PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID}
)


def launch_update(vm: Vm, command: KvmSevCmd) -> Step:
    """Load a range of one memslot; the VMM's structure is advanced by what was loaded."""
    sev, profile = vm.sev, vm.profile
    if sev is None or sev.gctx is None:
        return EINVAL
    wanted = copy_in(vm, KvmSevSnpLaunchUpdate, command.data)
    if wanted is None:
        return EFAULT
    if wanted.len % PAGE or wanted.flags or wanted.type not in _LOADABLE:
        return EINVAL
    if not wanted.len and profile.launch_update_len0_errno == -errno.EINVAL:
        return EINVAL
    has_source = wanted.type != PageType.ZERO
    if profile.launch_update_checks_uaddr_alignment and has_source and wanted.uaddr % PAGE:
        return EINVAL
    slot = vm.memory.slot_at(wanted.gfn_start * PAGE)
    if slot is None or not slot.has_memfd:
        return EINVAL
    if not wanted.len:
        return Step(profile.launch_update_len0_errno, 0)
    done, fw = _populate(vm, command.sev_fd, slot, wanted)
    if not done:
        return Step(-errno.EIO, fw)
    left = wanted.but(
        gfn_start=wanted.gfn_start + done,
        len=wanted.len - done * PAGE,
        uaddr=wanted.uaddr + (done * PAGE if has_source else 0),
    )
    try:
        vm.task.write(command.data, bytes(left))
    except BusError:
        return EFAULT
    return OK


def _populate(vm: Vm, fd: int, slot: MemorySlot, wanted: KvmSevSnpLaunchUpdate) -> tuple[int, int]:
    """Load pages up to the first failure or the slot's end: how many, and the failure's status."""
    gpa = wanted.gfn_start * PAGE
    npages = min(wanted.len, slot.gpa + slot.size - gpa) // PAGE
    at = 0
    while at < npages:
        if vm.task.signal_pending:
            return at, 0
        source = wanted.uaddr + at * PAGE if wanted.type != PageType.ZERO and wanted.uaddr else None
        if npages - at >= _LARGE_PAGES and _load_large(vm, fd, slot, gpa + at * PAGE, wanted.type, source):
            at += _LARGE_PAGES
            continue
        result = _load_page(vm, fd, slot, gpa + at * PAGE, wanted.type, source)
        if result.ret:
            return at, result.fw
        at += 1
    return npages, 0


def _load_large(vm: Vm, fd: int, slot: MemorySlot, gpa: int, page_type: int, source: int | None) -> bool:
    """Load 2 MiB with one command where the host is to (`launch_large`); False: nothing was done.

    Linux loads page by page. The launch digest is the same, and a kernel of many megabytes is there sooner.
    """
    memory, sev = vm.memory, vm.sev
    spa = slot.private_address(gpa)
    if not vm.host.launch_large or page_type not in _LARGE_TYPES or sev is None or spa is None:
        return False
    if (gpa | spa) % _LARGE or not memory.attributes.all_equal(
        gpa >> 12, (gpa + _LARGE) >> 12, MemoryAttribute.PRIVATE
    ):
        return False
    if memory.rmp.has_entries(spa):
        return False
    if source is not None:
        try:
            memory.system.write(spa, vm.task.read(source, _LARGE))
        except BusError:
            return False
    if vm.driver.make_private(spa, gpa=gpa, asid=sev.asid, immutable=True, page_size=1):
        return False
    buffer = update_buffer(sev, spa, page_type, page_size=1)
    if vm.driver.issue_by_fd(vm.task, fd, Command.SNP_LAUNCH_UPDATE, buffer).ret:
        vm.reclaim(spa)
        return False
    memory.note_assigned(slot, spa, large=True)
    return True


def _load_page(
    vm: Vm, fd: int, slot: MemorySlot, gpa: int, page_type: int, source: int | None
) -> DriverResult:
    memory, driver, sev = vm.memory, vm.driver, vm.sev
    spa = slot.private_address(gpa)
    if sev is None or spa is None or not memory.attributes.get(gpa >> 12) & MemoryAttribute.PRIVATE:
        return driver.refused(-errno.EINVAL)
    if memory.rmp[spa].assigned:
        return driver.refused(-errno.EEXIST)
    if page_type != PageType.ZERO:
        if source is None:
            return driver.refused(-errno.EINVAL)
        try:
            memory.system.write(spa, vm.task.read(source, PAGE))
        except BusError:
            return driver.refused(-errno.EFAULT)
    if ret := driver.make_private(spa, gpa=gpa, asid=sev.asid, immutable=True):
        return driver.refused(ret)
    result = driver.issue_by_fd(vm.task, fd, Command.SNP_LAUNCH_UPDATE, update_buffer(sev, spa, page_type))
    if result.ret == 0:
        memory.note_assigned(slot, spa)
    elif vm.reclaim(spa) and page_type == PageType.CPUID and result.fw == FirmwareStatus.INVALID_PARAM:
        _show_cpuid_page(vm, spa, source or 0)
    return result


def _show_cpuid_page(vm: Vm, spa: int, source: int) -> None:
    """The firmware left the page as it would accept it: userspace gets it for its error message."""
    try:
        vm.task.write(source, vm.memory.system.read(spa, PAGE))
    except BusError:
        return  # the kernel only notes it; the command's own error stands
