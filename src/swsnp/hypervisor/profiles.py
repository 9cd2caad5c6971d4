"""Which KVM this is: everything in which the modelled generations differ, as data.

Source: the series "SEV-SNP: Add KVM support for attestation and KVM_EXIT_COCO" (June 2024) with its
revised first patch; Linux 6.12.117 and 7.2.13, arch/x86/kvm/svm/sev.c and the uapi headers.
The series was based on kvm/next of June 2024: what it does not touch behaves as Linux 6.12.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from swsnp.abi import ghcb, kvm
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CertExit",
    "DEFAULT",
    "FirmwareErrors",
    "PROFILES",
    "Profile",
    "RequestPages",
    "profile",
]


class RequestPages(Enum):
    """Which pages the firmware is given for a guest request."""

    BOUNCE = "bounce pages of the VM, serialised by one mutex"
    GUEST = "the guest's own pages; the response page is the firmware's while it works"


class FirmwareErrors(Enum):
    """What becomes of a guest request that the firmware driver could not end well."""

    STATUS_TO_GUEST = "a firmware status goes to the guest, an error without one to the VMM"
    ALL_TO_VMM = "every error goes to the VMM at once and the response page stays with the firmware"
    ALL_TO_GUEST = "every error goes to the guest under the generic hypervisor code"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertExit:
    """The exit that asks userspace for certificates.

    Offsets count from the start of `kvm_run`, widths are in bits. `too_small`, `retry` and `generic` are
    the values of `ret` that a VMM may answer with; a `retry` of None cannot be said.
    """

    exit_reason: int
    record: type[kvm.ExitCoco | kvm.ExitSnpReqCerts]
    address_is_gfn: bool
    address_offset: int
    npages_offset: int
    npages_width: int
    ret_offset: int
    ret_width: int
    ok: int
    too_small: int
    retry: int | None
    generic: int
    unknown_ret: Literal["generic", "einval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One KVM. Where a code may be None, the field's text says what happens then."""

    name: str

    # The certificate exit and how it is enabled
    cert_exit: CertExit | None
    cap_exit_coco: bool
    """KVM_CAP_EXIT_COCO exists; its mask enables the exit."""
    enable_req_certs_command: bool
    """KVM_SEV_SNP_ENABLE_REQ_CERTS exists."""
    device_attr_req_certs: bool
    device_attr_policy_bits: bool

    # Launch
    init2_rejects_ghcb_v1_for_snp: bool
    policy_supported_bits: int
    policy_requires_smt: bool
    policy_refuses_single_socket: bool
    launch_update_len0_errno: int
    launch_update_checks_uaddr_alignment: bool

    # GHCB
    unregistered_ghcb_errno: int | None
    """Result of KVM_RUN; None: the guest is told `GhcbError.NOT_REGISTERED`."""
    snp_only_event_error: ghcb.GhcbError

    # Guest requests
    misaligned_request_error: ghcb.GhcbError | None
    """None: KVM_RUN ends with -EINVAL."""
    equal_request_pages_error: ghcb.GhcbError | None
    """None: not checked."""
    bad_cert_buffer_error: ghcb.GhcbError | None
    """RAX or RBX not valid, RAX not aligned. None: the generic hypervisor error in exit info 2."""
    ext_access_errno: int | None
    """Type byte not readable, or empty table not writable. None: the generic hypervisor error."""
    request_pages: RequestPages
    firmware_errors: FirmwareErrors
    generic_vmm_error: ghcb.VmmError

    # Page state changes
    map_gpa_other_result_errno: int | None
    """A result of userspace other than 0, EINVAL and EAGAIN. None: an error to the guest."""
    hypercall_ret_preset: bool
    """hypercall.ret is 0 when userspace is entered; else it keeps what was there."""
    psc_rereads_header: bool

    # AP creation
    ap_features_mask: int
    """Bits of SEV features in RAX that must equal the VM's."""
    ap_refusal_stops_target: bool
    """A refused creation takes the target's VMSA away (until "KVM: SVM: Don't change target vCPU state on AP
    Creation VMGEXIT error", 6.15 and stable kernels of April 2025)."""
    no_vmsa_reason: int
    """hardware_entry_failure_reason of a vCPU that was made to run without a VMSA."""


def _run_offset(record: type[kvm.ExitCoco | kvm.ExitSnpReqCerts], name: str) -> int:
    return kvm.EXIT_UNION + record.offset_of(name)


_COCO: Final = CertExit(
    exit_reason=kvm.ExitReason.COCO,
    record=kvm.ExitCoco,
    address_is_gfn=True,
    address_offset=_run_offset(kvm.ExitCoco, "gfn"),
    npages_offset=_run_offset(kvm.ExitCoco, "npages"),
    npages_width=32,
    ret_offset=_run_offset(kvm.ExitCoco, "ret"),
    ret_width=32,
    ok=kvm.ReqCertsV1.OK,
    too_small=kvm.ReqCertsV1.INVALID_LEN,
    retry=None,
    generic=kvm.ReqCertsV1.GENERIC,
    unknown_ret="generic",
)

_SNP_REQ_CERTS: Final = CertExit(
    exit_reason=kvm.ExitReason.SNP_REQ_CERTS,
    record=kvm.ExitSnpReqCerts,
    address_is_gfn=False,
    address_offset=_run_offset(kvm.ExitSnpReqCerts, "gpa"),
    npages_offset=_run_offset(kvm.ExitSnpReqCerts, "npages"),
    npages_width=64,
    ret_offset=_run_offset(kvm.ExitSnpReqCerts, "ret"),
    ret_width=64,
    ok=0,
    too_small=errno.ENOSPC,
    retry=errno.EAGAIN,
    generic=errno.EIO,
    unknown_ret="einval",
)

_POLICY_6_12: Final = (1 << 18) - 1 | 1 << 19 | 1 << 20
"""ABI version, SMT, reserved-one, debug, single socket."""
_POLICY_7_2: Final = _POLICY_6_12 | 0x1F << 21
"""And CXL, AES-256-XTS, RAPL, ciphertext hiding, page swap, as far as the firmware reports them."""
_INJECTION_MODES: Final = 1 << 3 | 1 << 4
_ALL_BITS: Final = (1 << 64) - 1

_LINUX_6_12: Final = Profile(
    name="linux-6.12",
    cert_exit=None,
    cap_exit_coco=False,
    enable_req_certs_command=False,
    device_attr_req_certs=False,
    device_attr_policy_bits=False,
    init2_rejects_ghcb_v1_for_snp=False,
    policy_supported_bits=_POLICY_6_12,
    policy_requires_smt=True,
    policy_refuses_single_socket=True,
    launch_update_len0_errno=-errno.EIO,
    launch_update_checks_uaddr_alignment=False,
    unregistered_ghcb_errno=-errno.EINVAL,
    snp_only_event_error=ghcb.GhcbError.MISSING_INPUT,
    misaligned_request_error=ghcb.GhcbError.MISSING_INPUT,
    equal_request_pages_error=ghcb.GhcbError.MISSING_INPUT,
    bad_cert_buffer_error=ghcb.GhcbError.INVALID_INPUT,
    ext_access_errno=-errno.EIO,
    request_pages=RequestPages.BOUNCE,
    firmware_errors=FirmwareErrors.STATUS_TO_GUEST,
    generic_vmm_error=ghcb.VmmError.GENERIC,
    map_gpa_other_result_errno=None,
    hypercall_ret_preset=False,
    psc_rereads_header=True,
    ap_features_mask=_INJECTION_MODES,
    ap_refusal_stops_target=False,
    no_vmsa_reason=0xFFFFFFFF,  # UNVERIFIED: the failing VMRUN's own exit code, 32 bits wide in 6.12
)

_LINUX_7_2: Final = replace(
    _LINUX_6_12,
    name="linux-7.2",
    cert_exit=_SNP_REQ_CERTS,
    enable_req_certs_command=True,
    device_attr_req_certs=True,
    device_attr_policy_bits=True,
    init2_rejects_ghcb_v1_for_snp=True,
    policy_supported_bits=_POLICY_7_2,
    policy_requires_smt=False,
    policy_refuses_single_socket=False,
    launch_update_len0_errno=-errno.EINVAL,
    launch_update_checks_uaddr_alignment=True,
    unregistered_ghcb_errno=None,
    snp_only_event_error=ghcb.GhcbError.INVALID_EVENT,
    misaligned_request_error=ghcb.GhcbError.INVALID_INPUT,
    equal_request_pages_error=ghcb.GhcbError.INVALID_INPUT,
    map_gpa_other_result_errno=-errno.EINVAL,
    hypercall_ret_preset=True,
    psc_rereads_header=False,
    ap_features_mask=_ALL_BITS,
    no_vmsa_reason=_ALL_BITS,
)

_COCO_V1: Final = replace(
    _LINUX_6_12,
    name="coco-v1",
    cert_exit=_COCO,
    cap_exit_coco=True,
    misaligned_request_error=None,
    equal_request_pages_error=None,
    bad_cert_buffer_error=None,
    ext_access_errno=None,
    request_pages=RequestPages.GUEST,
    firmware_errors=FirmwareErrors.ALL_TO_VMM,
    generic_vmm_error=ghcb.VmmError.GENERIC_V1,
    ap_refusal_stops_target=True,
)

_COCO_V1_REVISED: Final = replace(
    _COCO_V1, name="coco-v1-revised", firmware_errors=FirmwareErrors.ALL_TO_GUEST
)

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {each.name: each for each in (_COCO_V1, _COCO_V1_REVISED, _LINUX_6_12, _LINUX_7_2)}
)
"""The generations by name, oldest first."""

DEFAULT: Final = "linux-7.2"


def profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UsageError: no profile has it; the text lists those that exist.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError(f"KVM profile: got {name!r}, wanted one of {', '.join(PROFILES)}") from None
