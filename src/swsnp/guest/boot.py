"""From the first instruction to a guest whose driver can talk: GHCB, shared pages, secrets page.

Source: AMD 56421 (GHCB 2.0); Linux, arch/x86/boot/startup and arch/x86/coco/sev.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import GHCB_PROTOCOL_MAX, GHCB_PROTOCOL_MIN, PAGE, HvFeature, MsrCode, SevInfo
from swsnp.abi.snp_launch import CPUID_COUNT_MAX
from swsnp.errors import LayoutError, UsageError
from swsnp.guest.ap import place_vmsa, start_ap
from swsnp.guest.ghcb_page import GhcbPage
from swsnp.guest.page_state import share_page_by_msr, share_pages
from swsnp.guest.secrets import Secrets
from swsnp.guest.terminate import GeneralReason, LinuxReason, ReasonSet, msr_call, terminate

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.guest.cpu import GuestCpu

__all__ = [
    "CERTS_PAGES",
    "BootedGuest",
    "GuestLayout",
    "boot",
    "boot_ap",
    "place_vmsa",
    "resume",
    "resume_ap",
    "start_ap",
]

CERTS_PAGES: Final = 4
_CODE: Final = 0xFFF
_SNP_PROTOCOL: Final = 2
_VMPL_MAX: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestLayout:
    """Where things lie in guest physical memory; all page aligned.

    Attributes:
        secrets_page: private, filled at launch.
        cpuid_page: private, filled at launch; 0 when the guest was launched without one.
        ghcb_pages: one per vCPU.
        request_page: shared by `boot`.
        response_page: shared by `boot`.
        certs_buffer: four pages, shared by `boot`.
    """

    secrets_page: int
    cpuid_page: int
    ghcb_pages: tuple[int, ...]
    request_page: int
    response_page: int
    certs_buffer: int

    def shared_pages(self) -> tuple[int, ...]:
        """Everything that request and reply travel in, beside the GHCBs."""
        certs = range(self.certs_buffer, self.certs_buffer + CERTS_PAGES * PAGE, PAGE)
        return (self.request_page, self.response_page, *certs)


@dataclass(slots=True, kw_only=True)
class BootedGuest:
    """What the running guest kernel knows.

    Attributes:
        layout: as given to `boot`.
        version: negotiated GHCB protocol version.
        features: hypervisor feature bits.
        secrets: the secrets page.
        vmpl: privilege level of the guest; its VMPCK is the driver's default.
        ghcbs: registered GHCB per vCPU number.
    """

    layout: GuestLayout
    version: int
    features: int
    secrets: Secrets
    vmpl: int
    ghcbs: dict[int, GhcbPage] = field(default_factory=dict)
    _by_cpu: dict[GuestCpu, GhcbPage] = field(default_factory=dict, repr=False)

    def add_ghcb(self, vcpu: int, ghcb: GhcbPage) -> None:
        """Remember a vCPU's GHCB."""
        self.ghcbs[vcpu] = ghcb
        self._by_cpu[ghcb.cpu] = ghcb

    def ghcb_of(self, cpu: GuestCpu) -> GhcbPage | None:
        """The GHCB that `cpu` registered; None when it has none."""
        return self._by_cpu.get(cpu)


def boot(cpu: GuestCpu, layout: GuestLayout, *, vcpu: int = 0) -> Generator[None, None, BootedGuest]:
    """Boot the first vCPU.

    1. negotiate the protocol version (MSR 002h);
    2. read the hypervisor features (MSR 080h): SNP is required;
    3. share the GHCB page (MSR 014h) and register it (MSR 012h);
    4. share the request, response and certificate pages (page state change through the GHCB);
    5. read the secrets page, and the CPUID page's count.

    Args:
        cpu: the vCPU that runs this.
        layout: where the pages are.
        vcpu: its number, which selects the GHCB page.

    Returns:
        The booted guest.

    Raises:
        GuestTerminated: a step failed; the host was told through MSR 100h, with the codes that Linux uses.
    """
    version = yield from _negotiate(cpu)
    features = yield from _features(cpu, version)
    ghcb = yield from _ghcb(cpu, layout, vcpu, version)
    yield from share_pages(ghcb, layout.shared_pages())
    secrets = Secrets(cpu.memory, layout.secrets_page)
    try:
        secrets.check_version()
    except LayoutError as error:
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.SECRETS_PAGE, str(error))
    yield from _check_cpuid(cpu, layout)
    vmpl = yield from _vmpl(cpu, secrets)
    guest = BootedGuest(layout=layout, version=version, features=features, secrets=secrets, vmpl=vmpl)
    guest.add_ghcb(vcpu, ghcb)
    return guest


def boot_ap(cpu: GuestCpu, guest: BootedGuest, *, vcpu: int) -> Generator[None, None, GhcbPage]:
    """Bring up a further vCPU: share and register its own GHCB, and add it to the guest.

    Raises:
        GuestTerminated: as `boot`.
        UsageError: the layout has no GHCB page for this vCPU.
    """
    ghcb = yield from _ghcb(cpu, guest.layout, vcpu, guest.version)
    guest.add_ghcb(vcpu, ghcb)
    return ghcb


def resume(
    cpu: GuestCpu, layout: GuestLayout, *, version: int, vcpu: int = 0
) -> Generator[None, None, BootedGuest]:
    """Go on, on the first vCPU, where a guest that was saved and moved stopped.

    Memory came along: pages are shared already, and the secrets page holds keys and counters as they were.
    What the new host cannot know is asked or told again:

    1. its protocol versions (MSR 002h), which must have the one that the guest speaks;
    2. its features (MSR 080h): SNP is required;
    3. the GHCB (MSR 012h).

    Args:
        cpu: the vCPU that runs this.
        layout: as at boot.
        version: the protocol version negotiated at boot.
        vcpu: its number.

    Raises:
        GuestTerminated: a step failed.
    """
    spoken = yield from _negotiate(cpu)
    if spoken < version:
        why = f"this host speaks GHCB version {spoken}, wanted the guest's {version}"
        yield from terminate(cpu, ReasonSet.GENERAL, GeneralReason.PROTOCOL_UNSUPPORTED, why)
    features = yield from _features(cpu, version)
    secrets = Secrets(cpu.memory, layout.secrets_page)
    vmpl = yield from _vmpl(cpu, secrets)
    guest = BootedGuest(layout=layout, version=version, features=features, secrets=secrets, vmpl=vmpl)
    yield from resume_ap(cpu, guest, vcpu=vcpu)
    return guest


def resume_ap(cpu: GuestCpu, guest: BootedGuest, *, vcpu: int) -> Generator[None, None, GhcbPage]:
    """Register a vCPU's GHCB, shared since its boot, with a new host; its content stays.

    Raises:
        GuestTerminated: the host refused.
        UsageError: the layout has no GHCB page for this vCPU.
    """
    gpa = _ghcb_gpa(guest.layout, vcpu)
    yield from _register(cpu, gpa)
    ghcb = GhcbPage(cpu, gpa, guest.version)
    guest.add_ghcb(vcpu, ghcb)
    return ghcb


def _negotiate(cpu: GuestCpu) -> Generator[None, None, int]:
    reply = SevInfo((yield from msr_call(cpu, MsrCode.SEV_INFO_REQ)))
    spoken = reply.max_version >= GHCB_PROTOCOL_MIN and reply.min_version <= GHCB_PROTOCOL_MAX
    if reply.code != MsrCode.SEV_INFO_RESP or not spoken:
        why = f"SEV information: got {int(reply):#x}, wanted code 1 and a version within 1..2 (GHCB 2.0)"
        yield from terminate(cpu, ReasonSet.GENERAL, GeneralReason.GENERAL_REQUEST, why)
    return min(int(reply.max_version), GHCB_PROTOCOL_MAX)


def _features(cpu: GuestCpu, version: int) -> Generator[None, None, int]:
    features = 0
    if version >= _SNP_PROTOCOL:
        reply = yield from msr_call(cpu, MsrCode.HV_FEATURES_REQ)
        if reply & _CODE == MsrCode.HV_FEATURES_RESP:
            features = reply >> 12
    if not features & HvFeature.SNP:
        why = f"protocol version {version}, features {features:#x}: wanted version 2 and feature bit 0"
        yield from terminate(cpu, ReasonSet.GENERAL, GeneralReason.SNP_UNSUPPORTED, why)
    return features


def _ghcb(cpu: GuestCpu, layout: GuestLayout, vcpu: int, version: int) -> Generator[None, None, GhcbPage]:
    gpa = _ghcb_gpa(layout, vcpu)
    yield from share_page_by_msr(cpu, gpa)
    yield from _register(cpu, gpa)
    ghcb = GhcbPage(cpu, gpa, version)
    ghcb.clear()
    return ghcb


def _ghcb_gpa(layout: GuestLayout, vcpu: int) -> int:
    if not 0 <= vcpu < len(layout.ghcb_pages):
        raise UsageError(
            f"vcpu: got {vcpu}, wanted one of the {len(layout.ghcb_pages)} that have a GHCB page"
        )
    return layout.ghcb_pages[vcpu]


def _register(cpu: GuestCpu, gpa: int) -> Generator[None, None, None]:
    reply = yield from msr_call(cpu, gpa | MsrCode.REGISTER_GPA_REQ)
    if reply != gpa | MsrCode.REGISTER_GPA_RESP:
        why = f"GHCB registration: got {reply:#x}, wanted {gpa | MsrCode.REGISTER_GPA_RESP:#x}"
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.REGISTER, why)


def _check_cpuid(cpu: GuestCpu, layout: GuestLayout) -> Generator[None, None, None]:
    if not layout.cpuid_page:
        return
    count = int.from_bytes(cpu.memory.read(layout.cpuid_page, 4, private=True), "little")
    if count > CPUID_COUNT_MAX:
        why = f"CPUID page: {count} functions, wanted at most {CPUID_COUNT_MAX} (AMD 56860)"
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.CPUID, why)


def _vmpl(cpu: GuestCpu, secrets: Secrets) -> Generator[None, None, int]:
    """VMPL0, unless an SVSM has handed the page on and says otherwise."""
    if not secrets.svsm_present:
        return 0
    vmpl = secrets.svsm_guest_vmpl
    if not 1 <= vmpl <= _VMPL_MAX:
        why = f"SVSM present, guest VMPL {vmpl}, wanted 1..3"
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.SVSM_VMPL0, why)
    if secrets.svsm_caa % PAGE:
        why = f"SVSM calling area: got {secrets.svsm_caa:#x}, wanted page alignment"
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.SVSM_CAA, why)
    return vmpl
