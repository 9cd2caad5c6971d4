"""Setting up a guest on the host's KVM: what is asked for, and every refusal."""

from __future__ import annotations

import ctypes
import errno
import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Ioctl, KvmEnableCap
from swsnp.cpu.plain_kvm import c_bit_position, probe
from swsnp.cpu.plain_kvm.cpuid import c_bit_of, snp_leaves
from swsnp.cpu.plain_kvm.ioctls import (
    HostCapability,
    HostIoctl,
    KvmCpuidEntry,
    KvmMsrFilterRange,
    KvmUserspaceMemoryRegion,
)
from swsnp.cpu.plain_kvm.vm import HostVm
from swsnp.errors import HostError, UsageError

if TYPE_CHECKING:
    from tests.unit.plain_kvm.conftest import MakeProcessor, ScriptedKvm, ScriptedMemory

PRIVATE = 1 << 47


@pytest.mark.parametrize(
    ("number", "reason", "remedy"),
    [
        (errno.ENOENT, "no such device", "load kvm_amd or kvm_intel"),
        (errno.EACCES, "permission denied", "join the group kvm"),
        (errno.ENODEV, "No such device", "enable virtualization"),
    ],
)
def test_no_device(kvm: ScriptedKvm, number: int, reason: str, remedy: str) -> None:
    """A host without a usable /dev/kvm is told apart by its errno, and the verdict names what to do."""
    kvm.open_error = number
    with pytest.raises(HostError, match=reason):
        c_bit_position(kvm)
    verdict = probe(kvm)
    assert not verdict.usable
    assert reason in verdict.reason
    assert remedy in verdict.remedy
    assert remedy not in verdict.reason


def test_other_api_version(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Linux, KVM API: an application refuses to run when KVM_GET_API_VERSION is not 12."""
    kvm.version = 11
    with pytest.raises(HostError, match="API version 11, wanted 12"):
        HostVm(kvm, memory, ())
    assert not kvm.open_fds


@pytest.mark.parametrize("missing", list(HostCapability))
def test_missing_capability(kvm: ScriptedKvm, memory: ScriptedMemory, missing: HostCapability) -> None:
    """Without one of these capabilities MSRs or memory cannot be served: refused by name."""
    kvm.capabilities[missing] = 0
    with pytest.raises(HostError, match=rf"KVM_CAP_{missing.name} \({missing.value}\)"):
        HostVm(kvm, memory, ())
    assert not kvm.open_fds


@pytest.mark.parametrize(
    "refused",
    [
        Ioctl.KVM_CREATE_VM,
        Ioctl.KVM_ENABLE_CAP,
        HostIoctl.KVM_X86_SET_MSR_FILTER,
        HostIoctl.KVM_GET_SUPPORTED_CPUID,
        Ioctl.KVM_CREATE_VCPU,
        HostIoctl.KVM_SET_CPUID2,
        Ioctl.KVM_SET_SREGS,
        Ioctl.KVM_SET_REGS,
    ],
)
def test_set_up_refused(kvm: ScriptedKvm, processor: MakeProcessor, refused: Ioctl | HostIoctl) -> None:
    """Each refusal in setting up names the request and leaves no descriptor behind."""
    kvm.refuse[refused] = errno.EINVAL
    with pytest.raises(HostError, match=f"{refused.name}: Invalid argument") as caught:
        processor()
    assert not kvm.open_fds
    del caught  # until here it kept what was half set up alive, so nothing was closed by its end


def test_c_bit(kvm: ScriptedKvm) -> None:
    """The C-bit is the highest bit of the guest's MAXPHYADDR (Fn8000_0008 EAX[7:0]) of the host's KVM."""
    assert c_bit_position(kvm) == 47
    assert not kvm.open_fds


def test_c_bit_not_told() -> None:
    """A host that does not say its guests' address width is refused."""
    with pytest.raises(HostError, match="Fn8000_0008"):
        c_bit_of([KvmCpuidEntry(function=0x80000008)])


def test_cpuid(kvm: ScriptedKvm) -> None:
    """AMD 24594, Fn8000_001F: EAX bits 1, 3, 4; EBX[5:0] C-bit, EBX[11:6] address bits lost; vendor AMD."""
    kvm.leaves.append(KvmCpuidEntry(function=0x8000001F, eax=1))
    kvm.leaves.append(KvmCpuidEntry(function=0x8000001F, eax=1, ebx=51))
    found = snp_leaves(kvm.leaves)
    leaves = {leaf.function: leaf for leaf in found}
    assert len(leaves) == len(found)
    assert leaves[0x8000001F].eax == 0b11010
    assert leaves[0x8000001F].ebx == 47 | 1 << 6
    assert leaves[0x80000000].eax == 0x8000001F
    for function in (0, 0x80000000):
        leaf = leaves[function]
        vendor = b"".join(word.to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))
        assert vendor == b"AuthenticAMD"
    assert not any(0x40000000 <= function < 0x50000000 for function in leaves)


def test_msrs_that_leave(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Linux, KVM_X86_SET_MSR_FILTER: a clear bit denies; GHCB MSR and SEV_STATUS both ways, SYSCFG reads."""
    HostVm(kvm, memory, ())
    (enable,) = kvm.arguments(Ioctl.KVM_ENABLE_CAP)
    assert isinstance(enable, bytes)
    assert (KvmEnableCap.parse(enable).cap, KvmEnableCap.parse(enable).args[0]) == (188, 4)
    (argument,) = kvm.arguments(HostIoctl.KVM_X86_SET_MSR_FILTER)
    assert isinstance(argument, bytes)
    assert len(argument) == 0x188
    assert argument[:4] == bytes(4), "whatever no range denies is allowed"
    ranges = [KvmMsrFilterRange.parse_at(argument, at) for at in range(8, len(argument), 24)]
    assert [(each.base, each.nmsrs, each.flags) for each in ranges[:2]] == [
        (0xC0010130, 2, 3),
        (0xC0010010, 1, 1),
    ]
    assert not any(each.nmsrs for each in ranges[2:])


def test_msr_bitmap_denies(kvm: ScriptedKvm, memory: ScriptedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bitmap that the filter points at is there during the ioctl, and its bits are clear."""
    seen: list[bytes] = []
    ask = kvm.ioctl

    def look(fd: int, request: int, argument: int | bytearray = 0) -> int:
        if request == HostIoctl.KVM_X86_SET_MSR_FILTER and isinstance(argument, bytearray):
            seen.extend(
                ctypes.string_at(KvmMsrFilterRange.parse_at(argument, at).bitmap, 1) for at in (8, 32)
            )
        return ask(fd, request, argument)

    monkeypatch.setattr(kvm, "ioctl", look)
    HostVm(kvm, memory, ())
    assert seen == [b"\0", b"\0"]


def test_dropped_vm_gives_descriptors_back(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """A processor that nobody closed closes when it is collected; closing twice is allowed."""
    one = processor()
    assert len(kvm.open_fds) == 3
    del one
    gc.collect()
    assert not kvm.open_fds
    other = processor()
    other.close()
    other.close()
    assert not kvm.open_fds


# memory


def live(kvm: ScriptedKvm) -> dict[int, int]:
    """Address and size of the slots that KVM has now."""
    return {each.guest_phys_addr: each.memory_size for each in kvm.regions.values() if each.memory_size}


def test_two_planes(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Shared memory lies at the GPA, private memory at GPA | C-bit; KVM gets their own host addresses."""
    memory.share(0x8000, 0x8000)
    memory.private[0x234], memory.shared[0x8234] = 1, 2
    HostVm(kvm, memory, ()).prepare()
    assert live(kvm) == {PRIVATE: 0x8000, 0x8000: 0x8000}
    regions = kvm.regions.values()
    there = {each.guest_phys_addr: ctypes.string_at(each.userspace_addr + 0x234, 1) for each in regions}
    assert there == {PRIVATE: b"\1", 0x8000: b"\2"}


def test_unchanged_memory_asks_nothing(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Memory that lies where it lay costs no ioctl."""
    vm = HostVm(kvm, memory, ())
    vm.prepare()
    asked = len(kvm.asked)
    memory.lay((0, 0x10000))
    vm.prepare()
    assert len(kvm.asked) == asked


def test_page_changes_plane(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: a page is in one plane; what is gone leaves before what is new comes."""
    vm = HostVm(kvm, memory, ())
    vm.prepare()
    assert live(kvm) == {PRIVATE: 0x10000}
    memory.share(0xB000)
    vm.prepare()
    assert live(kvm) == {PRIVATE: 0xB000, 0xB000: 0x1000, PRIVATE | 0xC000: 0x4000}
    regions = [
        KvmUserspaceMemoryRegion.parse(each)
        for each in kvm.arguments(HostIoctl.KVM_SET_USER_MEMORY_REGION)
        if isinstance(each, bytes)
    ]
    assert [bool(each.memory_size) for each in regions] == [True, False, True, True, True]
    assert {each.slot for each in regions} == {0, 1, 2}


def test_slot_numbers_are_unique(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Linux, KVM_SET_USER_MEMORY_REGION: a number in use would change the slot that has it."""
    vm = HostVm(kvm, memory, ())
    memory.lay((0, 0x1000), (0x1000, 0x1000), (0x2000, 0x1000))
    vm.prepare()
    memory.lay((0x1000, 0x1000))
    vm.prepare()
    memory.lay(*((gpa, 0x1000) for gpa in range(0x1000, 0x6000, 0x1000)))
    vm.prepare()
    assert live(kvm) == {PRIVATE | gpa: 0x1000 for gpa in range(0x1000, 0x6000, 0x1000)}


def test_attributes_across_slots(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """An attribute's run may reach over slots, and over frames without memory."""
    memory.lay((0, 0x4000), (0x8000, 0x4000))
    memory.share(0x3000, 0x6000)
    HostVm(kvm, memory, ()).prepare()
    assert live(kvm) == {PRIVATE: 0x3000, 0x3000: 0x1000, 0x8000: 0x1000, PRIVATE | 0x9000: 0x3000}


def test_memory_that_is_not_there(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """No guest_memfd, a mapping that ends early, or a read-only one: accesses there leave to the check."""
    (whole,) = memory.current
    vm = HostVm(kvm, memory, ())
    memory.current = (replace(whole, private_view=None),)
    vm.prepare()
    assert live(kvm) == {}
    memory.share(0, 0x10000)
    memory.current = (replace(whole, shared_view=memory.shared[:0x3000]),)
    vm.prepare()
    assert live(kvm) == {0: 0x3000}
    memory.attributes.set(2, 3, 8)
    vm.prepare()
    assert live(kvm) == {0: 0x2000, PRIVATE | 0x2000: 0x1000}, "nothing begins where the mapping has ended"
    memory.current = (replace(whole, shared_view=memory.shared.toreadonly()),)
    vm.prepare()
    assert live(kvm) == {PRIVATE | 0x2000: 0x1000}


def test_slots_refused(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """KVM's refusal of a slot ends the run with a HostError."""
    kvm.refuse[HostIoctl.KVM_SET_USER_MEMORY_REGION] = errno.EEXIST
    with pytest.raises(HostError, match="KVM_SET_USER_MEMORY_REGION: File exists"):
        HostVm(kvm, memory, ()).prepare()


# code


def test_rewriting_waits_for_the_first_run(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """The launch measures code as it was given: it is changed when the guest is first entered, once."""
    code = bytes.fromhex("f3 0f 01 d9 f4")
    memory.private[0x8000:0x8005] = memory.private[0x9000:0x9005] = memory.shared[0x8000:0x8005] = code
    vm = HostVm(kvm, memory, (range(0x8000, 0x9000),))
    assert memory.private[0x8000:0x8005] == code
    vm.prepare()
    assert memory.private[0x8000:0x8005] == bytes.fromhex("e6 e8 90 90 f4")
    assert memory.private[0x9000:0x9005] == code, "not named as executable"
    assert memory.shared[0x8000:0x8005] == code, "the other plane"
    memory.private[0x8000:0x8005] = code
    vm.prepare()
    assert memory.private[0x8000:0x8005] == code
    assert vm.rewrite(range(0x8000, 0x9000)) == 1


@pytest.mark.parametrize("code", [range(0xF000, 0x11000), range(0x20000, 0x21000)])
def test_executable_outside_memory(kvm: ScriptedKvm, memory: ScriptedMemory, code: range) -> None:
    """Code that is not all there is refused: nothing would be rewritten in the rest."""
    with pytest.raises(UsageError, match="not all of it is private memory"):
        HostVm(kvm, memory, (code,)).prepare()


def test_executable_in_shared_memory(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """AMD 24593: instruction fetches are private; code in the shared plane is never rewritten."""
    memory.share(0x8000)
    with pytest.raises(UsageError, match="not all of it is private memory"):
        HostVm(kvm, memory, (range(0x8000, 0x9000),)).prepare()
