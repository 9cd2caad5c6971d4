"""The KVM profiles against the published interfaces, column by column.

Source: "SEV-SNP: Add KVM support for attestation and KVM_EXIT_COCO" (June 2024); Linux 6.12.117
and 7.2.13, include/uapi/linux/kvm.h and arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

import errno

import pytest

from swsnp.abi import kvm
from swsnp.errors import UsageError
from swsnp.hypervisor.profiles import (
    DEFAULT,
    PROFILES,
    CertExit,
    FirmwareErrors,
    Profile,
    RequestPages,
    profile,
)

COCO, COCO_REVISED, LINUX_6_12, LINUX_7_2 = PROFILES.values()


def test_names() -> None:
    """Four profiles, oldest first; the default is the newest kernel."""
    assert list(PROFILES) == ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
    assert all(name == each.name for name, each in PROFILES.items())
    assert profile(DEFAULT) is LINUX_7_2


def test_unknown_name() -> None:
    """A name that no profile has is refused, and the text lists those that exist."""
    with pytest.raises(UsageError, match=r"got 'linux-5\.4', wanted one of coco-v1, .*linux-7\.2"):
        profile("linux-5.4")


# The certificate exit: rows of the history table

EXIT_ROWS: list[tuple[str, object, object]] = [
    # property, series, upstream release
    ("exit_reason", 40, 43),
    ("record", kvm.ExitCoco, kvm.ExitSnpReqCerts),
    ("address_is_gfn", True, False),
    ("address_offset", 40, 32),
    ("npages_offset", 48, 40),
    ("npages_width", 32, 64),
    ("ret_offset", 52, 48),
    ("ret_width", 32, 64),
    ("ok", 0, 0),
    ("too_small", 1, errno.ENOSPC),
    ("retry", None, errno.EAGAIN),
    ("generic", 1 << 31, errno.EIO),
    ("unknown_ret", "generic", "einval"),
]


def cert_exit(of: Profile) -> CertExit:
    assert of.cert_exit is not None
    return of.cert_exit


@pytest.mark.parametrize(("name", "series", "upstream"), EXIT_ROWS)
def test_certificate_exit(name: str, series: object, upstream: object) -> None:
    """Each property of the certificate exit is that of its generation."""
    assert getattr(cert_exit(COCO), name) == series
    assert getattr(cert_exit(COCO_REVISED), name) == series
    assert getattr(cert_exit(LINUX_7_2), name) == upstream


def test_no_certificate_exit_in_6_12() -> None:
    """Linux 6.12 answers guest requests without a certificate exit."""
    assert LINUX_6_12.cert_exit is None


ROWS: list[tuple[str, object, object, object]] = [
    # field, series, Linux 6.12, Linux 7.2
    ("cap_exit_coco", True, False, False),
    ("enable_req_certs_command", False, False, True),
    ("device_attr_req_certs", False, False, True),
    ("device_attr_policy_bits", False, False, True),
    ("init2_rejects_ghcb_v1_for_snp", False, False, True),
    ("policy_supported_bits", 0x1BFFFF, 0x1BFFFF, 0x3FBFFFF),
    ("policy_requires_smt", True, True, False),
    ("policy_refuses_single_socket", True, True, False),
    ("launch_update_len0_errno", -errno.EIO, -errno.EIO, -errno.EINVAL),
    ("launch_update_checks_uaddr_alignment", False, False, True),
    ("unregistered_ghcb_errno", -errno.EINVAL, -errno.EINVAL, None),
    ("snp_only_event_error", 4, 4, 6),
    ("misaligned_request_error", None, 4, 5),
    ("equal_request_pages_error", None, 4, 5),
    ("bad_cert_buffer_error", None, 5, 5),
    ("ext_access_errno", None, -errno.EIO, -errno.EIO),
    ("request_pages", RequestPages.GUEST, RequestPages.BOUNCE, RequestPages.BOUNCE),
    ("generic_vmm_error", 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF),
    ("map_gpa_other_result_errno", None, None, -errno.EINVAL),
    ("hypercall_ret_preset", False, False, True),
    ("psc_rereads_header", True, True, False),
    ("ap_features_mask", 0x18, 0x18, (1 << 64) - 1),
    ("ap_refusal_stops_target", True, False, False),
]


@pytest.mark.parametrize(("name", "series", "linux_6_12", "linux_7_2"), ROWS)
def test_columns(name: str, series: object, linux_6_12: object, linux_7_2: object) -> None:
    """Each behaviour in which the generations differ; the revised patch changes none of these."""
    assert getattr(COCO, name) == series
    assert getattr(COCO_REVISED, name) == series
    assert getattr(LINUX_6_12, name) == linux_6_12
    assert getattr(LINUX_7_2, name) == linux_7_2


def test_firmware_errors() -> None:
    """What the revised patch changed: errors go to the guest; later kernels pass only a firmware status."""
    assert [each.firmware_errors for each in PROFILES.values()] == [
        FirmwareErrors.ALL_TO_VMM,
        FirmwareErrors.ALL_TO_GUEST,
        FirmwareErrors.STATUS_TO_GUEST,
        FirmwareErrors.STATUS_TO_GUEST,
    ]
