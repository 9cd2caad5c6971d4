"""The launch: order of the steps, what each passes to KVM, and what every refusal says."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.kvm import (
    Capability,
    KvmCreateGuestMemfd,
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmUserspaceMemoryRegion2,
)
from swsnp.abi.kvm_registers import KvmRegs, KvmSegment, KvmSregs
from swsnp.abi.snp_command import PageType
from swsnp.errors import UsageError
from swsnp.hardware import BusError
from swsnp.vmm.certs import BytesSource
from swsnp.vmm.config import LaunchPage, VmConfig, memory_map
from swsnp.vmm.launch import LaunchError, launch

if TYPE_CHECKING:
    from tests.unit.vmm.fake_host import FakeHost

MIB = 1 << 20
CERTS = BytesSource(b"table")
START = ["open /dev/kvm", "open /dev/sev", "KVM_CREATE_VM 4", "SEV_INIT2", "KVM_ENABLE_CAP 201 0x1000"]
MEMORY = ["KVM_CREATE_GUEST_MEMFD", "KVM_SET_USER_MEMORY_REGION2"]
END = ["KVM_SET_MEMORY_ATTRIBUTES", "KVM_CREATE_VCPU 0", "SNP_LAUNCH_FINISH"]


def page(kind: PageType = PageType.NORMAL, gpa: int = 0x1000, data: bytes = b"n" * 4096) -> LaunchPage:
    return LaunchPage(kind, gpa, data)


@pytest.mark.parametrize(
    ("certs", "dialect", "enabling"),
    [
        (None, None, []),
        (None, "linux-7.2", []),
        (None, "coco-v1", []),
        (CERTS, "linux-7.2", ["SNP_ENABLE_REQ_CERTS"]),
        (CERTS, "coco-v1", ["KVM_ENABLE_CAP 237 0x1"]),
        (CERTS, "coco-v1-revised", ["KVM_ENABLE_CAP 237 0x1"]),
        (CERTS, None, ["SNP_ENABLE_REQ_CERTS"]),
    ],
)
def test_order(host: FakeHost, certs: BytesSource | None, dialect: str | None, enabling: list[str]) -> None:
    """The exit is enabled after INIT2 and before vCPUs, and only for a VM that has certificates."""
    host.extensions[Capability.EXIT_COCO] = 1
    host.attributes[1, 2] = 1
    launch(host, VmConfig(memory_size=MIB, certs=certs), (), dialect=dialect)
    assert host.steps == [*START, *enabling, "SNP_LAUNCH_START", *MEMORY, *END]


REGISTERS = ["KVM_GET_REGS", "KVM_SET_REGS"]
START_OF_AN_AP = ["KVM_GET_REGS", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_SET_REGS"]


@pytest.mark.parametrize(
    ("signature", "eip", "first", "second"),
    [
        (None, None, [], []),
        (0xA00F11, None, REGISTERS, REGISTERS),
        (None, 0x80B004, [], START_OF_AN_AP),
        (0xA00F11, 0x80B004, REGISTERS, START_OF_AN_AP),
    ],
)
def test_registers_at_reset(
    host: FakeHost, signature: int | None, eip: int | None, first: list[str], second: list[str]
) -> None:
    """QEMU: RDX of every vCPU is the model's signature; all but the first start at the reset block's EIP."""
    launch(host, VmConfig(memory_size=MIB, vcpus=2, cpu_signature=signature, ap_reset_eip=eip), ())
    created = host.steps[host.steps.index("KVM_CREATE_VCPU 0") : -1]
    assert created == ["KVM_CREATE_VCPU 0", *first, "KVM_CREATE_VCPU 1", *second]
    if second:
        regs = KvmRegs.parse(host.payloads["KVM_SET_REGS"])
        assert (regs.rdx, regs.rip) == (signature or 0, 0xB004 if eip else 0)
    if eip:
        assert KvmSregs.parse(host.payloads["KVM_SET_SREGS"]).cs == KvmSegment(base=0x800000)


@pytest.mark.parametrize("step", ["KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_SET_SREGS"])
def test_registers_refused(host: FakeHost, step: str) -> None:
    """A vCPU whose registers cannot be set would be measured as another one."""
    host.answers[step] = -errno.EINVAL
    config = VmConfig(memory_size=MIB, vcpus=2, cpu_signature=1, ap_reset_eip=1)
    with pytest.raises(LaunchError, match=f"{step}: -EINVAL"):
        launch(host, config, ())
    assert host.open_fds == set()


@pytest.mark.parametrize("step", ["KVM_SET_REGS", "KVM_SET_SREGS"])
def test_start_refused(host: FakeHost, step: str) -> None:
    """A direct boot starts with registers of its own: without them it would be measured as another guest."""
    host.answers[step] = -errno.EINVAL
    with pytest.raises(LaunchError, match=f"{step}: -EINVAL"):
        launch(host, VmConfig(memory_size=MIB, start=(KvmRegs(), KvmSregs())), ())
    assert host.open_fds == set()


@pytest.mark.parametrize(
    ("name", "text"), [("cpu_signature", "cpu signature"), ("ap_reset_eip", "reset EIP")]
)
def test_registers_of_64_bits(name: str, text: str) -> None:
    """CPUID's EAX and the reset block's address have 32 bits."""
    for value in (0, (1 << 32) - 1):
        fits: dict[str, Any] = {name: value}
        VmConfig(**fits)
    for value in (1 << 32, -1):
        given: dict[str, Any] = {name: value}
        with pytest.raises(UsageError, match=f"{text}: got .*, wanted 32 bits"):
            VmConfig(**given)


def test_everything_that_is_passed(host: FakeHost) -> None:
    """INIT2, LAUNCH_START and LAUNCH_FINISH get what the configuration says."""
    config = VmConfig(
        memory_size=MIB,
        vcpus=3,
        policy=0xB0000,
        vmsa_features=0x200,
        id_block=b"I" * 96,
        id_auth=b"A" * 100,
        author_key_enabled=True,
        vcek_disabled=True,
        host_data=b"H" * 32,
        gosvw=b"G" * 16,
        sev_device="/dev/sev1",
    )
    launch(host, config, ())
    assert "open /dev/sev1" in host.steps
    assert [step for step in host.steps if "VCPU" in step] == [f"KVM_CREATE_VCPU {n}" for n in range(3)]
    assert KvmSevInit.parse(host.payloads["SEV_INIT2"][:48]) == KvmSevInit(vmsa_features=0x200)
    start = KvmSevSnpLaunchStart.parse(host.payloads["SNP_LAUNCH_START"][:64])
    assert (start.policy, start.gosvw, start.flags) == (0xB0000, b"G" * 16, 0)
    finish = KvmSevSnpLaunchFinish.parse(host.payloads["SNP_LAUNCH_FINISH"][:88])
    assert (finish.id_block_en, finish.auth_key_en, finish.vcek_disabled) == (1, 1, 1)
    assert finish.host_data == b"H" * 32
    assert finish.id_block_uaddr % 4096 == finish.id_auth_uaddr % 4096 == 0
    assert min(finish.id_block_uaddr, finish.id_auth_uaddr) > 0


def test_id_block_and_id_auth_in_memory(host: FakeHost) -> None:
    """KVM reads 96 and 4,096 bytes whatever the length of id-auth; what is missing is zero."""
    seen: list[bytes] = []
    plain = host.ioctl

    def look(fd: int, request: int, arg: Any = 0) -> int:
        result = plain(fd, request, arg)
        if host.steps[-1] == "SNP_LAUNCH_FINISH" and not seen:
            finish = KvmSevSnpLaunchFinish.parse(host.payloads["SNP_LAUNCH_FINISH"][:88])
            seen.extend((host.read(finish.id_block_uaddr, 96), host.read(finish.id_auth_uaddr, 4096)))
        return result

    host.ioctl = look  # type: ignore[method-assign]  # a spy
    launch(host, VmConfig(memory_size=MIB, id_block=b"I" * 96, id_auth=b"A" * 100), ())
    assert seen == [b"I" * 96, b"A" * 100 + bytes(3996)]


def test_id_auth_alone_sets_only_the_pointer(host: FakeHost) -> None:
    """QEMU: `id-auth=` of the series' command line is an empty string; without id-block it has no effect."""
    launch(host, VmConfig(memory_size=MIB, id_auth=b""), ())
    finish = KvmSevSnpLaunchFinish.parse(host.payloads["SNP_LAUNCH_FINISH"][:88])
    assert (finish.id_block_uaddr, finish.id_block_en) == (0, 0)
    assert finish.id_auth_uaddr != 0


def test_memory_is_private_from_the_start(host: FakeHost) -> None:
    """QEMU: every slot has a guest_memfd and the private attribute when it is added."""
    launch(host, VmConfig(memory_size=0xB000_0000), (page(gpa=0xFFFF_F000),))
    assert host.conversions == [(0, 2 << 30, 8), (1 << 32, 0x3000_0000, 8), (0xFFFF_F000, 4096, 8)]
    region = KvmUserspaceMemoryRegion2.parse(host.payloads["KVM_SET_USER_MEMORY_REGION2"])
    assert (region.slot, region.flags, region.guest_phys_addr, region.memory_size) == (
        2,
        4,
        0xFFFF_F000,
        4096,
    )
    assert region.guest_memfd in host.open_fds
    assert KvmCreateGuestMemfd.parse(host.payloads["KVM_CREATE_GUEST_MEMFD"]) == KvmCreateGuestMemfd(
        size=4096
    )


def test_image_in_order(host: FakeHost) -> None:
    """The order of LAUNCH_UPDATE is part of the measurement; data lie at their address."""
    image = (
        page(PageType.NORMAL, 0x10000, b"f" * 8192),
        page(PageType.ZERO, 0x1000, bytes(4096)),
        page(PageType.SECRETS, 0x3000, bytes(4096)),
        page(PageType.CPUID, 0x2000, b"c" * 4096),
        page(PageType.UNMEASURED, 0x5000, b"u" * 4096),
    )
    vm = launch(host, VmConfig(memory_size=MIB), image)
    assert host.updates == [(0x10, 2, 1), (1, 1, 3), (3, 1, 5), (2, 1, 6), (5, 1, 4)]
    assert vm.read(0x10000, 8192) == b"f" * 8192
    assert vm.read(0x2000, 4096) == b"c" * 4096
    assert host.steps.index("KVM_CREATE_VCPU 0") < host.steps.index("SNP_LAUNCH_UPDATE")


def test_update_goes_on_where_it_stopped(host: FakeHost) -> None:
    """KVM may do a part and say 0, or ask again with -EAGAIN; the loop ends at length 0."""
    host.update_pages = 2
    host.answers["SNP_LAUNCH_UPDATE"] = [-errno.EAGAIN, 0, -errno.EAGAIN, 0, 0]
    launch(host, VmConfig(memory_size=MIB), (page(data=bytes(5 * 4096)),))
    assert host.updates == [(1, 2, 1), (3, 2, 1), (5, 1, 1)]


@pytest.mark.parametrize("answer", [0, -errno.EAGAIN])
def test_update_without_progress(host: FakeHost, answer: int) -> None:
    """A kernel that says "again" for ever is an error, not an endless loop."""
    host.update_pages = 0
    host.answers["SNP_LAUNCH_UPDATE"] = answer
    with pytest.raises(LaunchError, match="no progress at 0x1000 in 101 calls"):
        launch(host, VmConfig(memory_size=MIB), (page(),))


def test_update_that_ends_elsewhere(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU checks the final GFN: length 0 with another end means that pages were skipped."""

    def skip(self: Any, address: int) -> None:
        self.write(address, (7).to_bytes(8, "little"))
        self.write(address + 16, bytes(8))

    monkeypatch.setattr(type(host), "_update", skip)
    with pytest.raises(LaunchError, match="ended at gpa 0x7000, wanted 0x2000"):
        launch(host, VmConfig(memory_size=MIB), (page(),))


def test_refused_cpuid_page_is_shown(host: FakeHost) -> None:
    """KVM copies the firmware's own CPUID values back when it refuses the page with INVALID_PARAM."""
    host.answers["SNP_LAUNCH_UPDATE"] = -errno.EIO
    host.errors["SNP_LAUNCH_UPDATE"] = 0x16
    with pytest.raises(LaunchError, match=r"-EIO; firmware status INVALID_PARAM \(0x16\)") as caught:
        launch(host, VmConfig(memory_size=MIB), (page(PageType.CPUID, data=b"c" * 4096),))
    assert caught.value.corrected == b"c" * 4096
    host.steps.clear()
    with pytest.raises(LaunchError) as caught:
        launch(host, VmConfig(memory_size=MIB), (page(PageType.NORMAL),))
    assert caught.value.corrected is None


@pytest.mark.parametrize(
    ("step", "result", "status", "text"),
    [
        ("open /dev/kvm", -errno.ENOENT, 0, "open /dev/kvm: -ENOENT"),
        ("open /dev/sev", -errno.ENOENT, 0, "open /dev/sev: -ENOENT"),
        ("KVM_CREATE_VM", -errno.EINVAL, 0, "KVM_CREATE_VM: -EINVAL; KVM does not offer SNP"),
        ("SEV_INIT2", -errno.EBUSY, 0, "SEV_INIT2: -EBUSY; all SNP address space identifiers"),
        ("KVM_ENABLE_CAP 201 0x1000", -errno.EINVAL, 0, "KVM_ENABLE_CAP(EXIT_HYPERCALL): -EINVAL"),
        ("SNP_ENABLE_REQ_CERTS", -errno.EINVAL, 0, "SNP_ENABLE_REQ_CERTS: -EINVAL"),
        ("SNP_LAUNCH_START", -errno.EINVAL, 0, "SNP_LAUNCH_START: -EINVAL; policy bits"),
        ("SNP_LAUNCH_START", -errno.EIO, 7, "-EIO; firmware status POLICY_FAILURE (0x07); the chip does not"),
        ("KVM_CREATE_GUEST_MEMFD", -errno.EINVAL, 0, "KVM_CREATE_GUEST_MEMFD: -EINVAL"),
        ("KVM_SET_USER_MEMORY_REGION2", -errno.EEXIST, 0, "KVM_SET_USER_MEMORY_REGION2: -EEXIST"),
        ("KVM_SET_MEMORY_ATTRIBUTES", -errno.EINVAL, 0, "KVM_SET_MEMORY_ATTRIBUTES: -EINVAL"),
        ("KVM_CREATE_VCPU", -errno.EINVAL, 0, "KVM_CREATE_VCPU: -EINVAL"),
        ("SNP_LAUNCH_UPDATE", -errno.EIO, 0x1A, "firmware status INVALID_PAGE_STATE (0x1a)"),
        ("SNP_LAUNCH_FINISH", -errno.EINVAL, 0, "id-block without id-auth"),
        ("SNP_LAUNCH_FINISH", -errno.EIO, 0x0B, "the launch digest in the ID block is not that of this"),
        ("SNP_LAUNCH_FINISH", -errno.EIO, 0xABCD, "firmware status 0xabcd; the firmware refused"),
    ],
)
def test_refusals(host: FakeHost, step: str, result: int, status: int, text: str) -> None:
    """Every step that fails: its command, errno, firmware status, what to look at; and nothing stays open."""
    host.answers[step] = result
    host.errors[step] = status
    with pytest.raises(LaunchError, match=re.escape(text)) as caught:
        launch(host, VmConfig(memory_size=MIB, certs=CERTS), (page(),), dialect="linux-7.2")
    assert (caught.value.errno, caught.value.firmware_status) == (-result, status)
    assert host.open_fds == set()
    assert host.memory == {}


def test_host_without_snp(host: FakeHost) -> None:
    """KVM_CHECK_EXTENSION(VM_TYPES) without bit 4: the launch ends before anything is made."""
    host.extensions[Capability.VM_TYPES] = 0b01111
    with pytest.raises(LaunchError, match="this host offers no SNP virtual machines"):
        launch(host, VmConfig(memory_size=MIB), ())
    assert host.steps == ["open /dev/kvm"]
    assert host.open_fds == set()


@pytest.mark.parametrize("dialect", [None, "linux-6.12"])
def test_certificates_without_an_exit(host: FakeHost, dialect: str | None) -> None:
    """A kernel without the exit cannot serve certificates: an error, not a VM that silently has none."""
    with pytest.raises(LaunchError, match="has no certificate exit; start it without certificates$"):
        launch(host, VmConfig(memory_size=MIB, certs=CERTS), (), dialect=dialect)


def test_capability_237_is_not_enabled_by_guess(host: FakeHost) -> None:
    """237 may be X86_APIC_BUS_CYCLES_NS, where a value of 1 would change the guest's timer."""
    host.extensions[Capability.EXIT_COCO] = 1
    with pytest.raises(LaunchError, match="dialect coco-v1"):
        launch(host, VmConfig(memory_size=MIB, certs=CERTS), ())
    assert not any("237" in step for step in host.steps)


def test_series_dialect_on_another_kernel(host: FakeHost) -> None:
    """Told that the kernel is the series', the VMM still asks for the sub-type's bit."""
    with pytest.raises(LaunchError, match="does not offer KVM_EXIT_COCO_REQ_CERTS"):
        launch(host, VmConfig(memory_size=MIB, certs=CERTS), (), dialect="coco-v1")


def test_unknown_dialect(host: FakeHost) -> None:
    """A profile name that does not exist is a usage error, and nothing is opened."""
    with pytest.raises(UsageError, match="dialect: got 'qemu'"):
        launch(host, VmConfig(memory_size=MIB), (), dialect="qemu")
    assert host.steps == []


def test_close_gives_everything_back(host: FakeHost) -> None:
    """Descriptors, memory and the vCPU mappings go; closing again is allowed."""
    with launch(host, VmConfig(memory_size=MIB, vcpus=2), (page(),)) as vm:
        assert host.open_fds != set()
    assert host.open_fds == set()
    assert host.memory == {}
    vm.close()


def test_shared_memory_bounds(host: FakeHost) -> None:
    """Reads and writes end where the memory ends; a write across two adjacent slots is one write."""
    vm = launch(host, VmConfig(memory_size=MIB), ())
    vm.write(MIB - 2, b"ab")
    assert vm.read(MIB - 2, 2) == b"ab"
    for call in (lambda: vm.read(MIB - 1, 2), lambda: vm.write(MIB - 1, b"xy"), lambda: vm.read(MIB, 1)):
        with pytest.raises(BusError):
            call()
    assert vm.read(MIB - 2, 2) == b"ab"


def test_write_across_adjacent_slots(host: FakeHost) -> None:
    """The flash below 4 GiB and the RAM above it touch: a buffer over the seam is written on both sides."""
    vm = launch(host, VmConfig(memory_size=0xB000_0000), (page(gpa=0xFFFF_F000),))
    vm.write(0xFFFF_FFFE, b"abcd")
    assert vm.read(0xFFFF_FFFE, 2) + vm.read(1 << 32, 2) == b"abcd"


# --- configuration


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cbitpos": 47}, "cbitpos: got 47, wanted the host's 51"),
        ({"reduced_phys_bits": 0}, "reduced-phys-bits: got 0, wanted 1..63"),
        ({"reduced_phys_bits": 64}, "reduced-phys-bits: got 64"),
        ({"vcpus": 0}, "vcpus: got 0"),
        ({"memory_size": 4097}, "memory size: got 0x1001"),
        ({"memory_size": 0}, "memory size: got 0x0"),
        ({"policy": 1 << 64}, "policy: got 0x1"),
        ({"gosvw": bytes(15)}, "guest-visible-workarounds: got 15 bytes, wanted exactly 16"),
        ({"host_data": bytes(33)}, "host-data: got 33 bytes, wanted exactly 32"),
        ({"id_block": bytes(95)}, "id-block: got 95 bytes, wanted exactly 96"),
        ({"id_auth": bytes(4097)}, "id-auth: got 4097 bytes, wanted at most 4096"),
    ],
)
def test_configurations_that_qemu_refuses(changes: dict[str, Any], text: str) -> None:
    """QEMU, sev-snp-guest: properties with a bound or an exact length."""
    with pytest.raises(UsageError, match=re.escape(text)):
        VmConfig(**changes)


def test_default_configuration() -> None:
    """QEMU: policy 0x30000 unless given; the C-bit is compared with the host's."""
    assert VmConfig().policy == 0x30000
    assert VmConfig(cbitpos=47, host_cbitpos=47).cbitpos == 47


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MIB, ((0, MIB),)),
        (0xAFFF_F000, ((0, 0xAFFF_F000),)),
        (0xB000_0000, ((0, 0x8000_0000), (1 << 32, 0x3000_0000))),
        (4 << 30, ((0, 2 << 30), (1 << 32, 2 << 30))),
    ],
)
def test_memory_map(size: int, expected: tuple[tuple[int, int], ...]) -> None:
    """q35: from 0xB0000000 bytes on memory is cut at 2 GiB and goes on at 4 GiB."""
    assert memory_map(size, ()) == expected


def test_firmware_makes_a_slot_below_4_gib() -> None:
    """Pages outside RAM are the firmware's flash, which ends at 4 GiB."""
    image = (page(gpa=0xFFFF_F000), page(gpa=0xFFC0_0000), page(gpa=0x1000))
    assert memory_map(MIB, image) == ((0, MIB), (0xFFC0_0000, 0x40_0000))


@pytest.mark.parametrize(
    ("gpa", "size"), [(MIB - 4096, 8192), (1 << 32, 4096), (0xFFFF_F000, 8192), (1 << 40, 4096)]
)
def test_pages_that_fit_nowhere(gpa: int, size: int) -> None:
    """A page half in RAM, or above all memory, is refused before anything is opened."""
    with pytest.raises(UsageError, match=f"launch page at {gpa:#x}"):
        memory_map(MIB, (page(gpa=gpa, data=bytes(size)),))


@pytest.mark.parametrize(
    ("kind", "gpa", "data", "text"),
    [
        (PageType.VMSA, 0, bytes(4096), "wanted one of NORMAL, ZERO, UNMEASURED, SECRETS, CPUID"),
        (PageType.NORMAL, 1, bytes(4096), "gpa 0x1"),
        (PageType.NORMAL, 0, b"", "0 bytes, wanted whole pages"),
        (PageType.NORMAL, 0, bytes(4095), "4095 bytes, wanted whole pages"),
    ],
)
def test_launch_pages_that_cannot_be(kind: PageType, gpa: int, data: bytes, text: str) -> None:
    """LAUNCH_UPDATE: VMSA pages are KVM's own; addresses and lengths are whole pages."""
    with pytest.raises(UsageError, match=text):
        LaunchPage(kind, gpa, data)
