"""SNP launch commands of KVM_MEMORY_ENCRYPT_OP: order of checks, results, what the firmware is given.

Source: Linux 7.2 and 6.12, arch/x86/kvm/svm/sev.c; Documentation/virt/kvm/x86/amd-memory-encryption.rst.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from swsnp import trace
from swsnp.abi.kvm import KvmSevCmd, KvmSevInit, KvmSevSnpLaunchStart, SevCommand, VmType
from swsnp.abi.snp_command import Activate, Command, GctxAddress, LaunchStart
from swsnp.abi.vmsa import SevFeatures
from swsnp.hypervisor.launch_common import EFAULT, EINVAL, ENOTTY, OK, SevState, Step, copy_in
from swsnp.hypervisor.launch_finish import launch_finish
from swsnp.hypervisor.launch_update import launch_update
from swsnp.hypervisor.profiles import RequestPages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from swsnp.abi.snp_report import GuestPolicy
    from swsnp.hypervisor.psp_driver import DriverResult
    from swsnp.hypervisor.vm import Vm

__all__ = ["SevState", "memory_encrypt_op", "tear_down"]

_GHCB_VERSION_MAX: Final = 2
_UNKNOWN: Final = Step(-errno.EINVAL, copy_back=False)
_NOT_PERMITTED: Final = Step(-errno.EPERM, copy_back=False)


def memory_encrypt_op(vm: Vm, arg: int | bytearray | memoryview) -> int:
    """KVM_MEMORY_ENCRYPT_OP.

    Args:
        vm: the VM; its lock is taken.
        arg: `KvmSevCmd` of 24 bytes, `error` written back also on failure; 0 is a null pointer.

    Returns:
        0 or -errno.
    """
    if not vm.host.snp_enabled:
        return -errno.ENOTTY
    if isinstance(arg, int):
        return -errno.EFAULT if arg else 0
    if len(arg) != KvmSevCmd.SIZE:
        return -errno.EFAULT
    command = KvmSevCmd.parse(arg)
    with vm.lock:
        step = _run(vm, command)
    error = command.error if step.error is None else step.error
    if step.copy_back:
        arg[:] = bytes(command.but(error=error))
    if (emit := vm.trace.emit) is not None:
        emit(trace.LaunchStep(vm=vm.name, command=command.id, result=step.ret, error=error))
    return step.ret


def _run(vm: Vm, command: KvmSevCmd) -> Step:
    if vm.sev is not None and command.id < SevCommand.SNP_LAUNCH_START:
        return _NOT_PERMITTED
    if command.id == SevCommand.SNP_ENABLE_REQ_CERTS and not vm.profile.enable_req_certs_command:
        return _UNKNOWN
    run = _COMMANDS.get(command.id)
    return _UNKNOWN if run is None else run(vm, command)


# KVM_SEV_INIT2


def _init2(vm: Vm, command: KvmSevCmd) -> Step:
    if vm.vm_type != VmType.SNP:
        return EINVAL
    wanted = copy_in(vm, KvmSevInit, command.data)
    if wanted is None:
        return EFAULT
    if vm.created_vcpus or wanted.flags or wanted.vmsa_features & ~vm.host.vmsa_features:
        return EINVAL
    if wanted.ghcb_version > _GHCB_VERSION_MAX:
        return EINVAL
    version = wanted.ghcb_version or _GHCB_VERSION_MAX
    if version < _GHCB_VERSION_MAX and vm.profile.init2_rejects_ghcb_v1_for_snp:
        return EINVAL
    asid = vm.host.asids.take()
    if asid < 0:
        return Step(asid)
    features = wanted.vmsa_features | SevFeatures.of(snp_active=1)
    sev = SevState(asid=asid, vmsa_features=features, ghcb_version=version)
    ready = vm.driver.initialise()
    ret = ready.ret or _allocate_request_pages(vm, sev)
    if ret:
        vm.host.asids.give_back(asid)
        return Step(ret, ready.fw)
    vm.sev = sev
    vm.memory.asid = asid
    return OK


def _allocate_request_pages(vm: Vm, sev: SevState) -> int:
    if vm.profile.request_pages is not RequestPages.BOUNCE:
        return 0
    try:
        sev.request_page = vm.host.memory.allocate_page()
    except OSError:
        return -errno.ENOMEM
    response = vm.driver.allocate_firmware_page()
    if response is None:
        vm.host.memory.free_page(sev.request_page)
        return -errno.EIO
    sev.response_page = response
    return 0


# KVM_SEV_SNP_ENABLE_REQ_CERTS


def _enable_req_certs(vm: Vm, _command: KvmSevCmd) -> Step:
    if vm.created_vcpus or vm.sev is None:
        return EINVAL
    vm.req_certs = True
    return OK


# KVM_SEV_SNP_LAUNCH_START


def _launch_start(vm: Vm, command: KvmSevCmd) -> Step:
    sev = vm.sev
    if sev is None:
        return ENOTTY
    wanted = copy_in(vm, KvmSevSnpLaunchStart, command.data)
    if wanted is None:
        return EFAULT
    if sev.gctx is not None or wanted.flags or not _accepts_policy(vm, wanted.policy):
        return EINVAL
    created = _create_context(vm, command.sev_fd, sev)
    if created.ret:
        return Step(-errno.ENOTTY, created.fw)
    result = _start_and_activate(vm, command.sev_fd, sev, wanted)
    if result.ret:
        _decommission(vm, sev)
        return Step(result.ret, result.fw)
    sev.policy, sev.sev_fd = int(wanted.policy), command.sev_fd
    return Step(0, result.fw)


def _accepts_policy(vm: Vm, policy: GuestPolicy) -> bool:
    profile = vm.profile
    return not (
        policy & ~vm.host.policy_bits
        or not policy.reserved_one
        or (profile.policy_requires_smt and not policy.smt)
        or (profile.policy_refuses_single_socket and policy.single_socket)
    )


def _create_context(vm: Vm, fd: int, sev: SevState) -> DriverResult:
    page = vm.driver.allocate_firmware_page()
    if page is None:
        return vm.driver.refused(-errno.ENOMEM)
    buffer = bytes(GctxAddress(gctx_paddr=page))
    result = vm.driver.issue_by_fd(vm.task, fd, Command.SNP_GCTX_CREATE, buffer)
    if result.ret:
        vm.driver.free_firmware_page(page)
    else:
        sev.gctx = page
    return result


def _start_and_activate(vm: Vm, fd: int, sev: SevState, wanted: KvmSevSnpLaunchStart) -> DriverResult:
    gctx = sev.gctx or 0
    secure_tsc = SevFeatures(sev.vmsa_features).secure_tsc
    start = LaunchStart(
        gctx_paddr=gctx,
        policy=wanted.policy,
        gosvw=wanted.gosvw,
        desired_tsc_khz=vm.host.tsc_khz if secure_tsc else 0,
    )
    result = vm.driver.issue_by_fd(vm.task, fd, Command.SNP_LAUNCH_START, bytes(start))
    if result.ret:
        return result
    activate = Activate(gctx_paddr=gctx, asid=sev.asid)
    return vm.driver.issue_by_fd(vm.task, fd, Command.SNP_ACTIVATE, bytes(activate))


# The end of a VM


def _decommission(vm: Vm, sev: SevState) -> bool:
    if sev.gctx is None:
        return True
    if vm.driver.issue(Command.SNP_DECOMMISSION, bytes(GctxAddress(gctx_paddr=sev.gctx))).ret:
        return False
    vm.driver.free_firmware_page(sev.gctx)
    sev.gctx = None
    return True


def tear_down(vm: Vm) -> None:
    """Give back what INIT2 and the launch took: VMSA pages, request pages, context, ASID.

    A page that cannot be taken back is lost and counted by the driver; a context that the firmware does not
    let go keeps its ASID for good.
    """
    for page in vm.vmsa_pages.values():
        if vm.driver.make_shared(page):
            vm.driver.leak(page)
        else:
            vm.driver.free_page(page)
    vm.vmsa_pages.clear()
    sev = vm.sev
    if sev is None:
        return
    if sev.response_page:
        vm.driver.free_firmware_page(sev.response_page)
        vm.host.memory.free_page(sev.request_page)
    if _decommission(vm, sev):
        vm.host.asids.give_back(sev.asid)


_COMMANDS: Final[Mapping[int, Callable[[Vm, KvmSevCmd], Step]]] = {
    SevCommand.SEV_INIT2: _init2,
    SevCommand.SNP_LAUNCH_START: _launch_start,
    SevCommand.SNP_LAUNCH_UPDATE: launch_update,
    SevCommand.SNP_LAUNCH_FINISH: launch_finish,
    SevCommand.SNP_ENABLE_REQ_CERTS: _enable_req_certs,
}
