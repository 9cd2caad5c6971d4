"""KVM_SEV_SNP_LAUNCH_FINISH: vCPUs are measured, the guest becomes runnable.

Source: Linux, arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from swsnp.abi.kvm import KvmSevCmd, KvmSevSnpLaunchFinish
from swsnp.abi.snp_command import Command, LaunchFinish, LaunchFinishFlags, PageType
from swsnp.abi.snp_launch import VMSA_GPA, IdAuth, IdBlock
from swsnp.abi.vmsa import SevFeatures
from swsnp.hardware.memory import BusError
from swsnp.hypervisor.launch_common import EFAULT, EINVAL, ENOTTY, Step, copy_in, update_buffer

if TYPE_CHECKING:
    from swsnp.hypervisor.launch_common import SevState
    from swsnp.hypervisor.psp_driver import DriverResult
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vm import Vm

__all__ = ["launch_finish"]


def launch_finish(vm: Vm, command: KvmSevCmd) -> Step:
    """Measure every vCPU, then end the launch, with an ID block if the VMM has one."""
    sev = vm.sev
    if sev is None:
        return ENOTTY
    if sev.gctx is None:
        return EINVAL
    wanted = copy_in(vm, KvmSevSnpLaunchFinish, command.data)
    if wanted is None:
        return EFAULT
    if wanted.flags:
        return EINVAL
    measured = _measure_vcpus(vm, sev, command.sev_fd)
    if measured.ret:
        return measured
    if not wanted.id_block_en:
        return _finish(vm, sev, wanted, (0, 0))
    pages: list[int] = []
    try:
        for address, size in ((wanted.id_block_uaddr, IdBlock.SIZE), (wanted.id_auth_uaddr, IdAuth.SIZE)):
            if not address:
                return Step(-errno.EINVAL, measured.error)
            content = vm.task.read(address, size)
            pages.append(vm.host.memory.allocate_page())
            vm.host.memory.write(pages[-1], content)
        return _finish(vm, sev, wanted, (pages[0], pages[1]))
    except BusError:
        return Step(-errno.EFAULT, measured.error)
    finally:
        for page in pages:
            vm.host.memory.free_page(page)


def _finish(vm: Vm, sev: SevState, wanted: KvmSevSnpLaunchFinish, id_pages: tuple[int, int]) -> Step:
    with_id = int(wanted.id_block_en != 0)
    flags = LaunchFinishFlags.of(
        id_block_en=with_id,
        auth_key_en=int(with_id and wanted.auth_key_en != 0),
        vcek_dis=wanted.vcek_disabled & 1,  # a one-bit field takes the value: 2 counts as 0
    )
    buffer = LaunchFinish(
        gctx_paddr=sev.gctx or 0,
        id_block_paddr=id_pages[0],
        id_auth_paddr=id_pages[1],
        flags=flags,
        host_data=wanted.host_data,
    )
    result = vm.driver.issue_by_fd(vm.task, sev.sev_fd, Command.SNP_LAUNCH_FINISH, bytes(buffer))
    sev.pre_fault_allowed = sev.pre_fault_allowed or not result.ret
    return Step(result.ret, result.fw)


def _measure_vcpus(vm: Vm, sev: SevState, fd: int) -> Step:
    if vm.created_vcpus != len(vm.vcpus):
        return Step(-errno.EBUSY)
    error: int | None = None
    for vcpu in vm.vcpus.values():
        if vcpu.measured:
            return Step(-errno.EINVAL, error)
        result = _measure_vcpu(vm, sev, fd, vcpu)
        error = result.fw
        if result.ret:
            return Step(result.ret, error)
    return Step(0, error)


def _measure_vcpu(vm: Vm, sev: SevState, fd: int, vcpu: Vcpu) -> DriverResult:
    page = vm.vmsa_pages.get(vcpu.id)
    if page is None:
        page = vm.vmsa_pages[vcpu.id] = vm.host.memory.allocate_page()
    state = vcpu.registers.vmsa(SevFeatures(sev.vmsa_features))
    vm.host.memory.write(page, bytes(state))
    if ret := vm.driver.make_private(page, gpa=VMSA_GPA, asid=sev.asid, immutable=True):
        return vm.driver.refused(ret)
    buffer = update_buffer(sev, page, PageType.VMSA)
    result = vm.driver.issue_by_fd(vm.task, fd, Command.SNP_LAUNCH_UPDATE, buffer)
    if result.ret == 0:
        vcpu.vmsa_page = page
        vcpu.measured = True
    elif not vm.reclaim(page):
        del vm.vmsa_pages[vcpu.id]
    return result
